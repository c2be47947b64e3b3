"""Laws of cleaned conversations: roles and fields stay, texts are edited one by one, and no step can join them."""

from __future__ import annotations

import gzip
import json

import pytest

from gptjax.cli.main import main
from gptjax.data import ChatJsonl
from gptjax.data.prepare import messages
from gptjax.types import UserError

CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
ROWS = [
    {
        "id": 1,
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "Write to ann@example.org,\n\n  please.\n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": "sent"}], "name": "look"},
            {"role": "assistant", "content": "It is donâ€™t problem: done.", "weight": 0.5},
        ],
        "tools": [],
    },
    {"messages": [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Blue, I think."}]},
    {"messages": [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Blue, I think."}]},
    {"messages": [{"from": "human", "value": "Which colour is it?"}, {"from": "gpt", "value": ""}], "id": 4},
    {"messages": [{"role": "user", "content": "?"}]},
]
JOINS = """
from gptjax.data.prepare import Step


class Join(Step):
    def __call__(self, text):
        return " ".join(text.split()).replace("\\ue000", "")


STEPS = (Join(),)
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", ROWS)
def test_messages_go_to_a_text_and_back(row):
    assert messages.replaced(row["messages"], messages.joined(row["messages"])) == row["messages"]


def test_conversations_are_cleaned(tmp_path):
    file, out = write(tmp_path / "chat.jsonl", ROWS), tmp_path / "out"
    command = ["data", "clean", file, str(out), "--text", "messages", "--recipe", "chat", "--processes", "1"]
    assert main(command) == 0
    (shard,) = out.glob("*.jsonl.gz")
    cleaned = [json.loads(line) for line in gzip.decompress(shard.read_bytes()).splitlines()]
    expected = json.loads(json.dumps([ROWS[0], ROWS[1], ROWS[3]]))
    expected[0]["messages"][1]["content"] = "Write to [e-mail],\n\n  please."
    expected[0]["messages"][-1]["content"] = "It is don’t problem: done."
    cleaned[0]["messages"][1]["content"] = cleaned[0]["messages"][1]["content"].rstrip("\n")
    assert cleaned == expected
    report = json.loads((out / "report.json").read_text())
    assert (report["documents"], report["kept"]) == (5, 3)
    with pytest.raises(UserError, match="first row"):  # the two forms stay as they were
        list(ChatJsonl(str(shard), validation=0.0).documents("train"))


def test_steps_that_join_messages_are_refused(tmp_path, capsys):
    file = write(tmp_path / "chat.jsonl", ROWS)
    (tmp_path / "join.py").write_text(JOINS)
    marked = write(tmp_path / "marked.jsonl", [{"messages": [{"role": "user", "content": "a\ue000b"}]}])
    other = write(tmp_path / "other.jsonl", [{"messages": [{"text": "Hi"}]}])
    cases = (
        (file, "c4", "got C4Quality, which is for texts, must be one of FixEncoding,"),
        (file, str(tmp_path / "join.py"), "a step made 1 messages of 4"),
        (marked, "chat", "marked.jsonl:1: got the character U+E000 in a message"),
        (other, "chat", "must have content, or value"),
    )
    for number, (path, recipe, words) in enumerate(cases):
        out = str(tmp_path / f"out{number}")
        assert main(["data", "clean", path, out, "--text", "messages", "--recipe", recipe, "--processes", "1"]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert len(error.splitlines()) == 1
