"""Replies are taken apart the same way however they come, and calls are written as they are read."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest

from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference.constraints import Choice, Compiler, Compound
from gptjax.inference.formats import TOOLS, Reader, Reasoning, ReplyFormat, reply_format

THINK = Reasoning("<think>", "</think>")
ROME, WHEN = ("weather", '{"city": "Ro\\"me {]"}'), ("now", "{}")
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro\\"me {]"}}\n</tool_call>'
SEPARATOR, CALL, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
MARKDOWN = "\n".join(f"{CALL}function{SEPARATOR}{name}\n```json\n{text}\n```{END}" for name, text in (ROME, WHEN))
NOW = '<tool_call>\n{"name": "now"}</tool_call>'
SCHEMA = {
    "$defs": {"x": {"enum": ["Rome", "Paris"]}},
    "type": "object",
    "properties": {"c": {"$ref": "#/$defs/x"}},
    "required": ["c"],
    "additionalProperties": False,
}
REPLIES = {
    # format, reply -> content, reasoning, calls
    "text": ("hermes", "Hello <tool>\n", "Hello <tool>\n", "", []),
    "hermes": (
        "hermes",
        f"I see.\n{HERMES}\n{NOW}\n",
        "I see.",
        "",
        [ROME, WHEN],
    ),
    "other order": (
        "hermes",
        '<tool_call>{"arguments": {"a": {"name": "x", "arguments": {}}}, "name": "f"}</tool_call>',
        "",
        "",
        [("f", '{"a": {"name": "x", "arguments": {}}}')],
    ),
    "no call": ("hermes", "a <tool_call>no</tool_call> b", "a <tool_call>no</tool_call> b", "", []),
    "cut": ("hermes", HERMES[:57], "", "", [("weather", '{"city": "Ro')]),
    "cut before": ("hermes", "a " + HERMES[:25], "a " + HERMES[:25], "", []),
    "mark in arguments": (
        "hermes",
        HERMES.replace("Ro", "</tool_call>"),
        "",
        "",
        [("weather", '{"city": "</tool_call>\\"me {]"}')],
    ),
    "thinking": ("hermes", f"<think>\nHm <\n\n</think>\n\nSo.{HERMES}", "So.", "Hm <", [ROME]),
    "thinking only": ("hermes", "\n<think>\nHm\n</thin", "", "Hm\n</thin", []),
    "no thinking": ("hermes", " a <think>", " a <think>", "", []),
    "llama": (
        "llama",
        f'{{"name": "weather", "parameters": {ROME[1]}}}; {{"type": "function", "name": "now", "parameters": {{}}}}',
        "",
        "",
        [ROME, WHEN],
    ),
    "llama with a tag": ("llama", f'<|python_tag|>{{"name": "weather", "parameters": {ROME[1]}}}', "", "", [ROME]),
    "llama's own json": ("llama", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', "", []),
    "mistral": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME[1]}, "id": "x"}}, {{"name": "now", "arguments":{{}}}}]',
        "",
        "",
        [ROME, WHEN],
    ),
    "mistral with arguments": (
        "mistral_args",
        f"Well[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{ROME[1]}[TOOL_CALLS]now[ARGS]{{}}",
        "Well",
        "",
        [ROME, WHEN],
    ),
    "deepseek": (
        "deepseek",
        f"<｜tool▁calls▁begin｜>{CALL}weather{SEPARATOR}{ROME[1]}{END}{CALL}now{SEPARATOR}{{}}{END}<｜tool▁calls▁end｜>",
        "",
        "",
        [ROME, WHEN],
    ),
    "deepseek with markdown": (
        "deepseek_markdown",
        f"Ok. <｜tool▁calls▁begin｜>{MARKDOWN}<｜tool▁calls▁end｜>",
        "Ok.",
        "",
        [ROME, WHEN],
    ),
}


def read(form: str, parts: list[str], thinking: bool = False):
    """Content, reasoning and calls, from the deltas."""
    reader = Reader(TOOLS[form], THINK, thinking)
    content, reasoning, calls = "", "", []
    for delta in [*map(reader.feed, parts), reader.close()]:
        content, reasoning = content + delta.content, reasoning + delta.reasoning
        for part in delta.calls:
            if part.name is not None:
                assert part.index == len(calls)
                calls.append([part.name, ""])
            calls[part.index][1] += part.arguments
    assert calls == [list(call) for call in reader.calls]
    return content, reasoning, [tuple(call) for call in calls]


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_the_same_wherever_it_is_cut(name):
    form, text, *expected = REPLIES[name]
    assert read(form, [text]) == tuple(expected)
    assert read(form, [*text]) == tuple(expected)
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == tuple(expected), text[:cut]


@pytest.mark.parametrize("form", [name for name in TOOLS if name != "harmony"])
def test_garbage_is_the_same_wherever_it_is_cut(form):
    draw = random.Random(0)
    pieces = [text for kind, text, *_ in REPLIES.values() if kind == form] + [*TOOLS[form].marks, "<think>", "</think>"]
    for _ in range(300):
        texts = draw.choices(pieces, k=3)
        text = "".join(one[draw.randrange(len(one)) :][: draw.randrange(1, 60)] + draw.choice(" \n{x") for one in texts)
        whole, cut = read(form, [text]), sorted(draw.choices(range(len(text)), k=3))
        assert read(form, [text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] : cut[2]], text[cut[2] :]]) == whole, text


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", [name for name in TOOLS if name != "harmony"])
def test_calls_are_read_as_they_are_written_and_as_they_are_held_to(name, special):
    """With the marks as special tokens, and as text; after reasoning that the prompt opened, and without."""
    form = TOOLS[name]
    assert read(name, [form.write([ROME, WHEN])]) == ("", "", [ROME, WHEN])
    marks = dict(enumerate([*form.marks, *dataclasses.astuple(THINK)], 256)) if special else {}
    tokenizer = Bytes(tuple(marks.values())).build(iter(()))
    format = ReplyFormat(form, THINK, marks)
    tools = {"weather": SCHEMA, "now": None}
    grammar, compiler, draw = format.calls(tools, parallel=True), Compiler(tokenizer, tokenizer.vocab), random.Random(1)
    several = 0
    opened = [i for i, mark in marks.items() if mark == THINK.open] or [*b"<think>"]
    prompt = [*opened, *b"\n"]
    for thinking in (False, True):
        constraint = compiler.compile(format.held(None, grammar, prompt if thinking else [], tokenizer))
        for _ in range(12):
            matcher, ids = constraint.start(), []
            if thinking:
                ids = [*b"Hm.", *(i for i, mark in marks.items() if mark == THINK.close)]
                ids = ids if special else [*b"Hm.</think>"]
            for token in ids:
                matcher.accept(token)
            while not matcher.finished and not (matcher.accepting and draw.random() < 0.1):
                mask = np.zeros(-(-tokenizer.vocab // 32), np.uint32)
                matcher.fill(mask)
                allowed = [*np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]
                ends = [i for i in allowed if i in marks or chr(i) in '}],;"'] if draw.random() < 0.9 else []
                ids.append(int(draw.choice(ends or allowed)))
                matcher.accept(ids[-1])
            text = b"".join(marks[i].encode() if i in marks else bytes([i]) for i in ids).decode()
            content, reasoning, calls = read(name, [text], thinking)
            assert (content, reasoning) == ("", "Hm." if thinking else "")
            assert calls
            several += len(calls) > 1
            for tool, arguments in calls:
                assert tool in tools
                assert tool == "now" or json.loads(arguments)["c"] in ("Rome", "Paris")
    assert several


def test_formats_are_told_by_templates_and_special_tokens():
    plain = Bytes().build(iter(()))
    for source, specials, name in (
        (None, (), "hermes"),
        ("{{ '<tool_call>' }}", (), "hermes"),
        ("x", ("<|python_tag|>",), "llama"),
        ("{{ '[TOOL_CALLS]' }}", ("[TOOL_CALLS]",), "mistral"),
        ("{{ '[TOOL_CALLS]' + '[ARGS]' }}", (), "mistral_args"),
        ("<｜tool▁calls▁begin｜>", (), "deepseek"),
        ("<｜tool▁calls▁begin｜>```json", (), "deepseek_markdown"),
        ("x", (), None),
    ):
        form = reply_format(source, plain.with_specials(specials))
        assert (form.tools and form.tools.name) == name
    form = reply_format("<think>", plain.with_specials(("<think>", "</think>")))
    start = [*b"assistant", plain.vocab]
    assert form.thinking([*start, 10], plain)
    assert not form.thinking([*start, *b"Hm", plain.vocab + 1, *b"\n\n"], plain)
    said = [*b"<think>", *plain.with_specials(("<|assistant|>",)).specials.values()]
    assert not form.thinking(said, plain), "what a user says opens nothing"
    yes = Choice(("yes",))
    for prompt, rule in (([*start, 10], "thought reply"), ([1], "(<[261]> thought)? reply"), ([261, 262, 10], "reply")):
        held = form.held(yes, None, prompt, plain)
        assert isinstance(held, Compound)
        assert held.lark.startswith(f"start: {rule}\n")


CHANNELS = (
    "<|channel|>analysis<|message|>Rome, then.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
)


def test_channels_are_reasoning_content_and_calls():
    def read(parts: list[str], tools: bool = True):
        reader = form.reader(tools, False)
        deltas = [*map(reader.feed, parts), reader.close()]
        return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), reader.calls

    tokenizer = Bytes(TOOLS["harmony"].marks).build(iter(()))
    form = reply_format("<|channel|>", tokenizer)
    expected = "I look.", "Rome, then.", [("weather", '{"city": "Rome"}')]
    for cut in range(len(CHANNELS)):
        assert read([CHANNELS[:cut], CHANNELS[cut:]]) == expected
    assert read([*CHANNELS]) == expected
    assert read(["Hello."]) == ("Hello.", "", [])
    tool_first = CHANNELS.replace(
        "<|channel|>commentary to=functions.weather <|constrain|>", " to=functions.weather<|channel|>"
    )
    for cut in range(len(tool_first)):
        assert read([tool_first[:cut], tool_first[cut:]]) == expected
    call = tool_first.rpartition("assistant")[2]
    for cut in range(len(call)):
        assert read([call[:cut], call[cut:]]) == ("", "", expected[2])
    assert read([" to", "day."]) == (" today.", "", [])
    assert read([CHANNELS], tools=False) == ('I look.{"city": "Rome"}', "Rome, then.", [])
    compiler = Compiler(tokenizer, tokenizer.vocab)
    held = form.held(Choice(("yes",)), form.calls({"now": None, "weather": SCHEMA}, True), [1], tokenizer)
    assert held is not None
    for text in ("<|channel|>final<|message|>yes", CHANNELS.replace("commentary<|message|>I look", "x")):
        matcher = compiler.compile(held).start()
        text = text.replace("<|end|><|start|>assistant<|channel|>x.", "").replace('"city"', '"c"')
        parts = re.split("(" + "|".join(map(re.escape, tokenizer.specials)) + ")", text)
        for part in parts:
            for token in [tokenizer.specials[part]] if part in tokenizer.specials else part.encode():
                matcher.accept(token)
        assert matcher.finished, text
