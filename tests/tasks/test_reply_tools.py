"""Laws of tools: calls are answered, wrong ones in words; one that cannot work is refused before the first step."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from gptjax.config import allow, from_json, to_json
from gptjax.evals import Generative
from gptjax.tasks import CountLetters, Function, Functions, Python, sandbox
from gptjax.train.rollouts import Rollouts
from gptjax.types import UserError

allow(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class LineLength(Function):
    """Length of a line of a poem."""

    poem: tuple[str, ...] = ("To be", "or not")

    def run(self, line: int, upper: bool = False, factor: float = 1.0, marks: list[str] | None = None) -> float:
        return len(self.poem[line]) * factor


@dataclasses.dataclass(frozen=True)
class Shout(Function):
    """A text in capitals."""

    def run(self, text: str) -> str:
        return text.upper()


@dataclasses.dataclass(frozen=True)
class Untyped(Function):
    """A function without a schema."""

    def run(self, text):
        return text


@dataclasses.dataclass(frozen=True)
class Length(Function):
    """Length of a line."""

    def run(self, line: int, upper: bool = False, factor: float = 1.0) -> float:
        return LineLength().run(line, upper, factor)


TOOLS = Functions((Length(), Shout()))


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ({"name": "length", "arguments": {"line": 1}}, "6.0"),
        ({"name": "length", "arguments": {"line": 0, "factor": 2, "upper": True}}, "10<"),
        ({"name": "shout", "arguments": {"text": "é"}}, "É"),
        ({"name": "length", "arguments": {}}, "error: line is missing"),
        ({"name": "length", "arguments": {"line": True}}, "error: line must be of type integer"),
        ({"name": "length", "arguments": {"line": 0, "upper": 1}}, "error: upper must be of type boolean"),
        ({"name": "length", "arguments": {"line": 9}}, "error: IndexError: tuple index out of range"),
        (
            {"name": "length", "arguments": {"line": 1, "x": 1}},
            "error: no parameter x, must be one of line, upper, fac",
        ),
        ({"name": "length", "arguments": [1]}, "error: arguments must be of type object"),
        ({"name": "sing"}, "error: no function sing, must be one of length, shout"),
        ([1], "error: must be {"),
    ],
)
def test_functions_are_called_by_name(call, answer):
    said = TOOLS.answer(f"I ask: <tool_call>{json.dumps(call)}</tool_call>")
    assert said is not None
    assert said.removeprefix("<tool_response>").startswith(answer)
    assert said.endswith("</tool_response>")


def test_a_schema_is_made_of_annotations():
    assert TOOLS.schemas[0] == {
        "type": "function",
        "function": {
            "name": "length",
            "description": "Length of a line.",
            "parameters": {
                "type": "object",
                "properties": {
                    "line": {"type": "integer"},
                    "upper": {"type": "boolean"},
                    "factor": {"type": "number"},
                },
                "required": ["line"],
            },
        },
    }
    assert LineLength().name == "line_length"
    made = Rollouts(CountLetters(), tools=(TOOLS, Python()))
    assert from_json(to_json(made)) == made
    assert TOOLS.answer("no call </tool_call>") is None
    assert TOOLS.answer("<tool_call>{</tool_call>") == (
        '<tool_response>error: must be {"name": ..., "arguments": {...}}</tool_response>'
    )


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (
            Functions((Shout(), Untyped())),
            r"^tools: Untyped has no schema: its parameter text must be annotated",
        ),
        (Functions((LineLength(),)), r"^tools: LineLength has no schema: its parameter marks must be annotated"),
        (Functions((Shout(), Shout())), r"^tools: got functions shout, shout, must be some of different names"),
        (Functions(()), r"^tools: got functions none, must be"),
    ],
)
def test_a_tool_without_a_schema_is_refused(tools, message):
    for make in (Rollouts, Generative):
        with pytest.raises(UserError, match=message):
            make(CountLetters(), tools=(tools,))


def test_python_runs_in_the_sandbox(monkeypatch):
    try:
        sandbox.run("")
    except UserError as error:
        pytest.skip(str(error))
    python = Python(seconds=2)
    python.check()
    for program, answer in (
        ("print(2**10)", "1024"),
        ("import math\nfor i in range(3):\n    print(math.factorial(i), end=' ')", "1 1 2"),
        ("print('before')\n1 / 0", "before\nZeroDivisionError: division by zero"),
        ("open('/etc/passwd')", "PermissionError: [Errno 13] Permission denied: '/etc/passwd'"),
        ("while True: pass", "no end in 2 s"),
        ("import os\nos._exit(0)", "ended before its last line, with exit code 0"),
        ("pass", ""),
    ):
        assert python.answer(f"Let me see. <python>{program}</python>") == f"<output>{answer}</output>"
    assert python.answer("print(1)</python>") is None
    said = dataclasses.replace(python, longest=20).answer("<python>print('x' * 10**6)</python>")
    assert said == f"<output>{'x' * 20}</output>"

    def refuse(*arguments: object) -> sandbox.Outcome:
        raise UserError("sandbox: a program that a model wrote cannot be confined here")

    monkeypatch.setattr(sandbox, "run", refuse)
    with pytest.raises(UserError, match=r"^sandbox: "):
        Rollouts(CountLetters(), tools=(python,))
