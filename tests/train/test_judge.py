"""Laws of a judge behind an address: its grades are the rewards, and a run without it stops where it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import re
import threading

import jax
import numpy as np
import pytest
from test_rollouts import ROLLOUTS, STAGE, TOKENIZER, policy, run

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.data.chat import Message
from gptjax.evals import Judge
from gptjax.io import retry
from gptjax.monitor import metrics
from gptjax.types import Unavailable, UserError


class Grader(http.server.BaseHTTPRequestHandler):
    """OpenAI's interface. The grade is the number of different letters of the reply, up to 9."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        server.bodies.append(body)
        if server.failures:
            server.failures -= 1
            status, answer = 503, {}
        elif server.left == 0:
            status, answer = 401, {"error": {"message": "the key has expired"}}
        else:
            server.left -= 1
            status = 200
            reply = re.search(r"=== Reply ===\n(.*)\n\n=== End", body["messages"][0]["content"], re.DOTALL)[1]
            said = "I would give [[9]], but: " + server.form.format(min(len(set(reply)), 9))
            answer = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Grader) as made:
        made.bodies, made.failures, made.left, made.form = [], 0, 10**6, "[[{}]]"
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def judge(server, **fields) -> Judge:
    return Judge(f"http://127.0.0.1:{server.server_port}/v1", "grader", scale=(0, 9), **fields)


def test_grades_are_the_rewards(server):
    """Requests that fail twice are repeated, and the order of the rewards is that of the replies."""
    server.failures = 2
    made = dataclasses.replace(ROLLOUTS, reward=judge(server, max_tokens=7))
    with contextlib.closing(made.batches(TOKENIZER, "train", 0, "")) as rounds:
        batch = jax.device_get(rounds.next_batch(policy(rounds)))
        said = [record["reply"] for record in rounds.records]
    np.testing.assert_allclose(batch.rewards, [min(len(set(text)), 9) / 9 for text in said], rtol=0, atol=1e-6)
    assert len(set(batch.rewards)) > 1
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {("grader", 0.0, 7)}
    assert "=== Conversation ===\nuser: " in server.bodies[0]["messages"][0]["content"]
    assert "[[0]] is the worst grade and [[9]] the best" in server.bodies[0]["messages"][0]["content"]
    other = dataclasses.replace(made, reward=judge(server, max_tokens=8))
    assert other.prompts(TOKENIZER, "train").fingerprint != made.prompts(TOKENIZER, "train").fingerprint


@pytest.mark.sampled
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_whose_judge_is_lost_stops_at_a_checkpoint_and_is_resumed(server, tmp_path, ahead):
    """The judge grades right and empty replies of four items, and the replies of a few rounds of eight."""
    data = dataclasses.replace(ROLLOUTS, reward=judge(server), ahead=ahead)
    stage = dataclasses.replace(STAGE, data=data, steps=4)
    server.left = 8 + 8 * 3
    with pytest.raises(Unavailable, match=r"url: got status 401 of .*: .*the key has expired"):
        run(tmp_path, stage)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 3
    server.left = 10**6
    run(tmp_path, stage)
    assert [line["step"] for line in metrics.read(tmp_path) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.alone
def test_without_a_judge_nothing_begins(server, tmp_path):
    server.left = 0
    with pytest.raises(UserError, match=r"^rl.data.reward.url: got status 401 .*expired"):
        run(tmp_path, dataclasses.replace(STAGE, data=dataclasses.replace(ROLLOUTS, reward=judge(server))))
    gone = dataclasses.replace(judge(server), url="http://127.0.0.1:9")
    refusal = r"^rl.data.reward.url: got http://127.0.0.1:9, which does not answer as OpenAI's does: "
    with pytest.raises(UserError, match=refusal):
        run(tmp_path, dataclasses.replace(STAGE, data=dataclasses.replace(ROLLOUTS, reward=gone)))
    assert not metrics.read(tmp_path)


def test_an_answer_without_a_grade_is_named(server):
    asked = (Message("user", "a"), Message("assistant", "bcd"))
    for form in ("[[1{}]]", "I cannot"):  # beyond the scale, or none
        server.form = form
        if form == "[[1{}]]":
            message = r"reward: got no grade from 0 to 9 of grader for 'bcd', but .*; set ungraded"
            with pytest.raises(UserError, match=message):
                judge(server)([asked])
            assert judge(server, ungraded=0.25)([asked, asked]) == [0.25, 0.25]
        else:
            assert judge(server)([asked]) == [1.0], "the last grade in the answer counts"
    for fields, message in (
        ({"scale": (3, 3)}, "scale: got 3 to 3"),
        ({"instructions": "Grade {this}."}, "instructions: got braces"),
        ({"url": "localhost"}, "url: got 'localhost', must begin with http"),
        ({"requests": 0}, "requests: got 0"),
    ):
        with pytest.raises(UserError, match=message):
            Judge(**{"url": "http://x", "model": "m"} | fields)
