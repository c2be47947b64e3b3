"""Judges compare replies blind, everything is kept at once, and a comparison is resumed where it was."""

import json
import subprocess
import sys

import pytest

from gptjax.evals import judge
from gptjax.evals.comparison import SHARED, Comparison, Unit, item_of, read_prompts
from gptjax.evals.ratings import Vote
from gptjax.types import UserError


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"Question {i}?" for i in range(40)))
    return read_prompts(path)


def replied(folder, prompts, names="abc"):
    comparison = Comparison(folder, prompts, list(names))
    for name in names:
        for item in comparison.missing(name):
            comparison.add_reply(name, item, f"{name} says {item}")
    return comparison


def test_sides_are_drawn_evenly_and_orders_are_shared_at_first(tmp_path, prompts):
    comparison = replied(tmp_path / "out", prompts)
    ann, bob = comparison.units("ann"), comparison.units("bob")
    assert set(ann) == set(bob)
    assert len(ann) == 40 * 3
    assert ann[:SHARED] == bob[:SHARED]
    assert ann[SHARED:] != bob[SHARED:]
    left = sum(unit.sides("ann") == unit.pair for unit in ann)
    assert abs(left - 60) < 4 * 120**0.5 / 2
    assert any(unit.sides("ann") != unit.sides("bob") for unit in ann)


def test_a_killed_comparison_goes_on_where_it_was(tmp_path, prompts):
    comparison = replied(tmp_path / "out", prompts, "ab")
    unit = comparison.units("ann")[0]
    comparison.add_vote(Vote(unit.item, *unit.sides("ann"), "left", "ann"))
    for file in (tmp_path / "out" / "votes.jsonl", tmp_path / "out" / "replies" / "a.jsonl"):
        with file.open("a") as half:
            half.write('{"item": "a line that was being writ')
    again = Comparison(tmp_path / "out", prompts, ["a", "b"])
    assert (again.votes, again.replies) == (comparison.votes, comparison.replies)
    assert not again.missing("a")
    assert again.chosen("ann") == {unit: "left"}


def test_replies_are_bound_to_what_made_them(tmp_path, prompts):
    comparison = replied(tmp_path / "out", prompts, "ab")
    with pytest.raises(UserError, match="another folder"):
        comparison.bind("a", {"path": "elsewhere"})


def test_the_report_says_who_is_better_and_how_judges_err(tmp_path, prompts):
    comparison = replied(tmp_path / "out", prompts, "ab")
    for name in ("ann", "bob"):
        for unit in comparison.units(name):
            sides = unit.sides(name)
            comparison.add_vote(Vote(unit.item, *sides, "left" if sides[0] == "a" else "right", name))
    for unit in comparison.units("model:lazy"):
        for sides in (unit.pair, unit.pair[::-1]):
            comparison.add_vote(Vote(unit.item, *sides, "left", "model:lazy"))
    said = comparison.report()
    assert "Verdicts: 120. Judges: 3. Pairs of replies: 40, to 40 prompts." in said
    assert "a is preferred to b: 83.3%" in said, "the lazy judge only says tie"
    assert "Votes of lazy prefer the left or first reply: 100.0%" in said
    assert said.index("| a |") < said.index("| b |")


def test_equal_replies_are_not_shown(tmp_path, prompts):
    comparison = Comparison(tmp_path / "out", prompts, ["a", "b"])
    for name in "ab":
        for item in prompts:
            comparison.add_reply(name, item, "the same")
    assert comparison.units("ann") == []


def test_prompts_of_all_forms_and_their_faults(tmp_path):
    path = tmp_path / "p.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path.write_text("\n".join(json.dumps(row) for row in ({"prompt": "Hi"}, {"messages": talk}, {"prompt": "你好"})))
    found = read_prompts(path)
    assert [prompt[-1].text for prompt in found.values()] == ["Hi", "你好"], "a conversation ends before its last reply"
    assert all(item_of(prompt) == item for item, prompt in found.items())
    for line in ('{"text": "Hi"}', '{"prompt": 3}', '{"messages": [{"role": "x", "content": ""}]}'):
        path.write_text(line)
        with pytest.raises(UserError, match=r"p\.jsonl:1"):
            read_prompts(path)
    (tmp_path / "p.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"^prompts: got .*p\.txt, which is not UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_a_models_verdict_is_its_last_word():
    assert judge.verdict("[[A]] seems fine, but ... [[B]]") == "right"
    assert judge.verdict("A is better") is None
    (prompt,) = [(("m"),)]
    assert Unit("i", ("a", "b")).sides("x") in (("a", "b"), ("b", "a"))
    assert prompt


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Judge(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "wise"}]}))
    def do_POST(self):
        said = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][0]["content"]
        good = said.index("=== Reply A ===") < said.index("splendid") < said.index("=== Reply B ===")
        chunk = {"choices": [{"delta": {"content": "[[A]]" if good else "[[B]]"}}]}
        self.answer(f"data: {json.dumps(chunk)}\\n\\ndata: [DONE]\\n\\n")
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(body.encode())
    def log_message(self, *_): pass

server = HTTPServer(("127.0.0.1", 0), Judge)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_model_judges_over_the_command_line(tmp_path, capsys):
    from gptjax.cli.main import main

    (tmp_path / "p.txt").write_text("one\ntwo\nthree")
    for name, said in (("a", "splendid"), ("b", "poor")):
        rows = ({"prompt": prompt, "reply": f"{said} {prompt}"} for prompt in ("one", "two", "three"))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        models = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
        command = ["compare", *models, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
        assert main([*command, "--judge", f"http://127.0.0.1:{port}"]) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert "a is preferred to b: 100.0%" in capsys.readouterr().out
    assert len((tmp_path / "out" / "votes.jsonl").read_text().splitlines()) == 6, "both orders"
    assert main([*command, "--report"]) == 0
    assert main(["compare", *models, "--prompts", str(tmp_path / "no"), "--out", "x"]) == 2
