"""Conversations in the three formats that people have, from every kind of table."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from gptjax import data
from gptjax.data import Alpaca, ChatJsonl, Conversations, Csv, Jsonl, Message, OpenAIMessages, Parquet, ShareGPT
from gptjax.data.chat import conversation, render
from gptjax.types import UserError

PAIRS = [(f"Question {n}?", f"Answer {n}.") for n in range(30)]
EXPECTED = [(Message("user", question), Message("assistant", answer)) for question, answer in PAIRS]


def openai(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def parts(question, answer):
    pieces = [{"type": "text", "text": piece} for piece in (question[:3], question[3:])]
    return openai(pieces, [{"type": "text", "text": answer}])


def sharegpt(question, answer):
    return {"id": "a", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def alpaca(question, answer):
    return {"instruction": question, "input": "", "output": answer}


ROWS = {make: [make(*pair) for pair in PAIRS] for make in (openai, parts, sharegpt, alpaca)}


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("make", ROWS)
@pytest.mark.parametrize(("name", "table"), [("a.jsonl", Jsonl), ("a.json", Jsonl), ("a.parquet", Parquet)])
def test_formats_are_recognised_in_every_kind_of_file(tmp_path, make, name, table):
    source = Conversations(table(write(tmp_path / name, ROWS[make]), validation=0.3))
    train, validation = (list(source.documents(split)) for split in ("train", "validation"))
    assert [c for c in EXPECTED if c in train] == train
    assert {*train, *validation} == set(EXPECTED)
    assert source.questions(2) == [(question.content, answer.content) for question, answer in validation[:2]]
    if table is Jsonl:
        short = ChatJsonl(source.table.path, validation=0.3)
        assert list(short.documents("train")) == train
        assert short.fingerprint() == source.fingerprint()


def test_a_format_can_be_given_and_a_table_have_text_alone(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n2+2?,4\n")
    rows = Conversations(Csv(str(tmp_path / "a.csv"), validation=0.0), Alpaca("question", None, "answer"))
    assert list(rows.documents("train")) == [(Message("user", "2+2?"), Message("assistant", "4"))]
    turns = write(tmp_path / "a.jsonl", [{"turns": openai(*pair)["messages"]} for pair in PAIRS])
    assert list(ChatJsonl(turns, 0.0, format=OpenAIMessages("turns")).documents("train")) == EXPECTED
    both = write(tmp_path / "b.jsonl", [openai("a", "b") | alpaca("c", "d")])
    assert list(ChatJsonl(both, 0.0, format=Alpaca()).documents("train")) == [
        (Message("user", "c"), Message("assistant", "d"))
    ]


def test_everything_in_a_row_is_read():
    row = {"system": "Be brief.", "history": [["1?", "1."]], "instruction": "2?", "input": "in", "output": "2."}
    assert [(m.role, m.content) for m in Alpaca().conversation(row)] == [
        ("system", "Be brief."),
        ("user", "1?"),
        ("assistant", "1."),
        ("user", "2?\nin"),
        ("assistant", "2."),
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    row = {
        "system": "Be brief.",
        "tools": json.dumps(tools),
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
    }
    shared = ShareGPT().conversation(row)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert shared == OpenAIMessages().conversation({"messages": messages, "tools": tools})
    assert shared[0].tools == tuple(tools)
    assert [message.as_json() for message in shared] == messages


def test_a_message_of_weight_0_is_not_trained():
    tokenizer = data.Bytes().build(iter(()))
    talk = [("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "fg")]
    messages = [{"role": role, "content": content, "weight": int(content != "bcd")} for role, content in talk]
    ids, weights = render(conversation(messages), tokenizer)
    assert ids == render(tuple(Message(*turn) for turn in talk), tokenizer)[0]
    assert tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight]) == "fg"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [openai("a", "b"), sharegpt("a", "b")],
            r":2: got a row of ShareGPT\(.*first row of the file is of OpenAIMessages\(.*one format per file",
        ),
        ([alpaca("a", "b"), {"instruction": "a"}], r":2: got the fields instruction, must be those of a conversation"),
        ([openai("a", "b") | alpaca("a", "b")], r"which are OpenAIMessages\(.*\) and Alpaca\("),
        ([{"text": "a"}], r':1: got the fields text, must be .*: "messages", "conversations", or "instruction" and'),
        ([5], r":1: got int, must be"),
        ([openai([{"type": "image_url", "image_url": {}}], "b")], r":1: content: got a part of type 'image_url', must"),
        ([openai(["a"], "b")], r"content: got a part of type 'str'"),
        ([openai("a", None)], r":1: content: got NoneType, must be text"),
        (
            [sharegpt("a", "b"), {"conversations": [{"from": "martian", "value": "a"}]}],
            r":2: from: got 'martian'",
        ),
        ([{"conversations": [{"from": "gpt"}]}], r":1: message: got .*, must have from and value"),
        ([{"conversations": [{"from": "function_call", "value": "{"}]}], r"function_call: got a text that is not JSON"),
        ([alpaca("a", 5)], r":1: output: got int, must be text"),
        ([alpaca("a", "b") | {"history": ["x"]}], r"history: got .*, must be a list of pairs"),
        ([openai("a", "b") | {"tools": "[1]"}], r"tools: got .*, must be a list of objects"),
        ([{"messages": [{"role": "assistant", "content": "", "tool_calls": "f()"}]}], r"tool_calls: got 'f\(\)', must"),
    ],
)
def test_errors_name_the_row(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as caught:
        list(ChatJsonl(write(tmp_path / "a.jsonl", rows), validation=0.0).documents("train"))
    assert str(caught.value).startswith(f"path: {tmp_path / 'a.jsonl'}:")
    assert "\n" not in str(caught.value)


def test_files_of_a_glob_may_have_their_own_formats(tmp_path):
    for number, rows in enumerate(ROWS.values()):
        write(tmp_path / f"{number}.jsonl", rows)
    assert list(ChatJsonl(str(tmp_path / "*.jsonl"), 0.0).documents("train")) == EXPECTED * len(ROWS)


def test_tools_are_texts_in_our_own_format():
    """Only what the assistant writes is trained, its calls included."""
    tokenizer = data.Bytes().build(iter(()))
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3", "tool_call_id": "c"},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": "3"},
    ]
    talk = conversation(said, [{"type": "function", "function": {"name": "add"}}])
    ids, weights = render(talk, tokenizer)
    text = "".join(chr(i) if i < 256 else f"[{i}]" for i in ids)
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    results = "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"
    assert text.endswith(f"[258]1?[260][259]{one}\n{one}[260][258]{results}[260][259]3[260]")
    assert text.startswith('[256][257]You may call these tools:\n<tools>\n{"type": "function", "function": {"name"')
    trained = "".join(chr(i) if i < 256 else f"[{i}]" for i, weight in zip(ids, weights, strict=True) if weight)
    assert trained == f"{one}\n{one}[260]3[260]"
