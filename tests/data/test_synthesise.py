"""Laws of synthetic data: nothing is asked twice, the order is that of the rows, every reply is accounted for."""

import dataclasses
import http.server
import json
import threading

import jax
import pytest

from gptjax.cli.main import main
from gptjax.data import Bytes, ChatJsonl, Message
from gptjax.data.prepare.output import source_of
from gptjax.data.prepare.pipeline import documents_of
from gptjax.data.prepare.synthesise import Replied, Synthesis, synthesise
from gptjax.evals.rejection import rejection_sampled
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.tasks import Generation, Score, Task
from gptjax.types import UserError

REPLIES = ["right", "right", "", "wrong", "fine"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"question {i}", "id": [i]}) + "\n" for i in range(4)))
    return path


def run(rows, out, write, synthesis, keep=lambda row, reply: reply != "wrong", settings="model"):
    source = source_of(str(rows), "text")
    counts = synthesise(lambda: documents_of(source, "train"), "text", synthesis, settings, write, out, keep)
    return counts, [json.loads(line) for line in out.read_text().splitlines()]


def test_replies_are_filtered_counted_and_asked_once(rows, tmp_path):
    asked = []

    def write(prompts):
        """In reverse order, and interrupted after seven."""
        for one in reversed(prompts):
            asked.append(one)
            yield Replied(one.key, REPLIES[one.sample], one.sample < 4)
            if len(asked) == 7:
                raise KeyboardInterrupt

    synthesis = Synthesis("Answer {id}: {text}", samples=5)
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "out", write, synthesis)
    assert not (tmp_path / "out").exists()
    with open(tmp_path / "out.replies", "a") as file:
        file.write('{"key": "half')
    counts, made = run(rows, tmp_path / "out", write, synthesis)
    assert len({one.key for one in asked}) == len({one.seed for one in asked}) == 20
    assert len(asked) == 20
    assert counts == {"kept": 4, "repeated": 4, "empty": 4, "refused": 4, "cut off": 4}
    prompts = [row["messages"] for row in made]
    assert prompts == [
        [{"role": "user", "content": f"Answer [{i}]: question {i}"}, {"role": "assistant", "content": "right"}]
        for i in range(4)
    ]
    assert [row["id"] for row in made] == [[i] for i in range(4)]

    count = len(asked)
    (tmp_path / "out").unlink()
    texts = Synthesis("Answer {id}: {text}", samples=5, most=1, form="text")
    counts, made = run(rows, tmp_path / "out", write, texts, keep=lambda row, reply: True)
    assert len(asked) == count  # another filter asks nothing
    assert made[3] == {"text": "right", "id": [3]}
    assert counts == {"kept": 4, "repeated": 4, "empty": 4, "beyond most": 4, "cut off": 4}
    (tmp_path / "out").unlink()
    run(rows, tmp_path / "out", write, synthesis, settings="another model")
    assert len(asked) == count + 20


def test_mistakes_are_named(rows, tmp_path, capsys):
    with pytest.raises(UserError, match=r"^prompt: got \{question\}, must be a column: text, id"):
        run(rows, tmp_path / "out", lambda asked: [], Synthesis("{question}"))
    with pytest.raises(UserError, match=r"^keep: keeps no reply \(4 cut off\)"):
        run(rows, tmp_path / "out", lambda asked: [Replied(one.key, "x", False) for one in asked], Synthesis("{text}"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"^samples: got 0"):
        Synthesis("", samples=0)
    with pytest.raises(UserError, match=r"^prompt: got '\{text', must have columns in braces"):
        Synthesis("{text")
    for arguments, words in [
        (["--prompt", "{text}"], "model: got none"),
        (["--prompt", "{text}", "--url", "http://x"], "name: got none"),
        (["--model", "m"], "prompt: got none"),
    ]:
        assert main(["data", "synthesise", str(rows), str(tmp_path / "out"), *arguments]) == 2
        assert words in capsys.readouterr().err


class Stub(http.server.BaseHTTPRequestHandler):
    """A server with OpenAI's interface, which repeats the prompt and the seed; its third reply is an error."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        said = body["messages"][0]["content"]
        status = 400 if self.server.failing and "question 2" in said else 200
        choice = {"message": {"content": f"{said} / {body['seed']}"}, "finish_reason": "stop"}
        answer = json.dumps({"choices": [choice]} if status == 200 else {"error": {"message": "no"}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_a_server_writes_and_an_error_keeps_what_is_there(rows, tmp_path, capsys):
    (tmp_path / "keep_some.py").write_text("def keep(row, reply):\n    return row['id'] != [1]\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        server.bodies, server.failing = [], True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = ["data", "synthesise", str(rows), str(tmp_path / "out.jsonl"), "--url", url, "--name", "m"]
        command += [
            "--prompt",
            "Say: {text}",
            "--rows",
            "1",
            "--form",
            "text",
            "--keep",
            str(tmp_path / "keep_some.py"),
        ]
        assert main(command) == 2
        assert "got status 400" in capsys.readouterr().err
        before, server.failing = len(server.bodies), False
        assert main(command) == 0
        server.shutdown()
    assert capsys.readouterr().out.endswith("3 kept, 1 refused\n")
    assert len(server.bodies) - before <= 4
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"].split(" / ")[0] for row in made] == [f"Say: question {i}" for i in (0, 2, 3)]
    assert server.bodies[0]["model"] == "m"
    assert server.bodies[0]["temperature"] == 1.0


@dataclasses.dataclass(frozen=True)
class Short(Task):
    """Replies of an even number of characters are right."""

    def __len__(self):
        return 3

    def example(self, i):
        return Message("system", "Be short."), Message("user", f"say {i}"), Message("assistant", str(10 + i))

    def score(self, i, reply):
        return Score(float(len(reply.text) % 2 == 0))

    @property
    def generation(self):
        return Generation(max_tokens=3, stop=tuple("abcdefghijklmnopqrstuvwxyz"))


def test_replies_that_a_task_rewards_are_kept():
    ends = [("ab", True), ("ab", True), ("a", True), ("abcd", False), ("cd", True), ("ef", True)]
    records = [
        {"item": i, "sample": n, "reply": text, "finished": finished, "outcome": float(len(text) % 2 == 0)}
        for n, (text, finished) in reversed([*enumerate(ends)])
        for i in (1, 0)
    ]
    rows, counts = rejection_sampled(Short(), records, most=2)
    assert counts == {"kept": 4, "repeated": 2, "refused": 2, "cut off": 2, "beyond most": 2}
    assert [(row["item"], row["messages"][-1]["content"]) for row in rows] == [
        (0, "ab"),
        (0, "cd"),
        (1, "ab"),
        (1, "cd"),
    ]
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    with pytest.raises(UserError, match="least: got 2, which keeps no reply"):
        rejection_sampled(Short(), records, least=2)


@pytest.fixture
def model(tmp_path):
    tokenizer = Bytes().build([])
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(0), jax.numpy.zeros((1, 2), int))["params"]
    LanguageModel(config, params, tokenizer).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_task_samples_by_rejection(model, tmp_path, capsys):
    """An untrained model ends one of ten replies by a letter at once: an empty one, which is right."""
    out = tmp_path / "chats.jsonl"
    command = ["data", "synthesise", str(out), "--model", str(model), "--task", "test_synthesise:Short"]
    command += ["--samples", "16", "--rows", "16", "--max_tokens", "3"]
    code = main(command)
    printed = capsys.readouterr()
    replies = [json.loads(line) for line in (tmp_path / "chats.jsonl.replies").read_text().splitlines()[1:]]
    assert len(replies) == 48
    right = {(r["item"], r["reply"]) for r in replies if r["finished"] and r["outcome"] == 1}
    assert code == 0, printed
    kept = [*ChatJsonl(str(out), validation=0.0).documents("train")]
    assert {(int(chat[1].text[4:]), chat[2].text) for chat in kept} == right
    assert main([*command, "--prompt", "x"]) == 2
    assert "prompt: got x beside a task" in capsys.readouterr().err


def test_a_model_of_this_machine_writes(rows, model, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["data", "synthesise", str(rows), str(out), "--model", str(model), "--prompt", "{text}"]
    code = main([*command, "--samples", "2", "--max_tokens", "4", "--form", "text"])
    assert code == (0 if out.exists() else 2)  # all may be cut off
    made = [json.loads(line) for line in (tmp_path / "out.jsonl.replies").read_text().splitlines()]
    assert len({reply["key"] for reply in made}) == 8
    assert len({reply["text"] for reply in made}) > 4
