"""Tools that a model uses in the middle of a reply: it writes a call, the tool's answer is put behind it, it goes on.

    Calculator().answer("12 boxes of 3 are <<12*3=")   # "36>>"

A tool is a frozen dataclass with `mark`, the text that ends a call, and `answer`; a new one is one class. A reply may
have several calls. Tokens of an answer are read by the model, and are not trained. `Functions` are one's own, called as
JSON by name, `Python` runs programs in the sandbox.
"""

from __future__ import annotations

import abc
import ast
import dataclasses
import inspect
import json
import operator
import re
import typing
from fractions import Fraction
from typing import Any

from gptjax.tasks import sandbox
from gptjax.types import UserError, one_line

LONGEST = 100
"""Maximum number of characters of a calculation."""
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class Tool(abc.ABC):
    """A tool. Base class of frozen dataclasses."""

    @property
    @abc.abstractmethod
    def mark(self) -> str:
        """Text that ends a call."""

    @abc.abstractmethod
    def answer(self, text: str) -> str | None:
        """Text to put behind `text`, a reply so far, which ends with the mark. None: it is no call."""

    def check(self) -> None:  # noqa: B027 nothing to check
        """Raise UserError if the tool cannot be used."""


@dataclasses.dataclass(frozen=True)
class Calculator(Tool):
    """Arithmetic in the form of GSM8K (Cobbe et al. 2021, arXiv:2110.14168): after "<<48/2=" stands "24>>".

    Numbers, + - * / // and parentheses, calculated exactly; the result is rounded to 10 digits."""

    @property
    def mark(self) -> str:
        return "="

    def answer(self, text: str) -> str | None:
        _, start, expression = text.removesuffix(self.mark).rpartition("<<")
        if not start or ">>" in expression:
            return None
        found = calculate(expression)
        return f"{'?' if found is None else _written(found)}>>"


def calculate(expression: str) -> Fraction | None:
    """Value of an arithmetic expression. None: it is none, is too long or divides by zero. Commas between thousands and
    signs of percent and currency are allowed, as GSM8K has them."""
    if len(expression) > LONGEST:
        return None
    plain = expression.replace(",", "").replace("$", "").replace("%", "/100").strip()
    try:
        return _value(ast.parse(plain, mode="eval").body, plain)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(int() | float()):
            written = ast.get_source_segment(source, node) or ""  # not as a binary float
            if not re.fullmatch(r"[0-9.]+", written):  # 1e999999999 would take all memory
                raise ValueError
            return Fraction(written)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, source)
        case ast.UnaryOp(ast.UAdd(), operand):
            return _value(operand, source)
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return Fraction(_OPERATORS[type(op)](_value(left, source), _value(right, source)))
    raise ValueError


def _written(value: Fraction) -> str:
    """A number as people write it: 24, 0.5, 3.333333333."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
"""Annotations of a function's parameters, and their types in JSON schema."""


class Function(abc.ABC):
    """A function that a model may call. Base class of frozen dataclasses, which define `run` with annotations:

    class Weather(Function):
        def run(self, city: str, days: int = 1) -> str: ...
    """

    run: Any
    """The function: keyword arguments -> a value that is put into the reply, as JSON unless it is a text."""

    @property
    def name(self) -> str:
        """Name to call it by: that of the class in small letters, Weather -> weather."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def schema(self) -> dict[str, Any]:
        """The function as OpenAI's API has it, with the JSON schema of its parameters. Raises UserError, with the
        parameter, if there is none."""
        run = getattr(self, "run", None)
        if run is None:
            raise UserError(f"tools: {type(self).__name__} has no schema: it must define run")
        hints, fields, required = typing.get_type_hints(run), {}, []
        for parameter in inspect.signature(run).parameters.values():
            kind = hints.get(parameter.name)
            if (typing.get_origin(kind) or kind) not in KINDS or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                names = ", ".join(kind.__name__ for kind in KINDS)
                raise UserError(
                    f"tools: {type(self).__name__} has no schema: its parameter {parameter.name} must be annotated as "
                    f"one of {names}"
                )
            fields[parameter.name] = {"type": KINDS[typing.get_origin(kind) or kind]}
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        parameters = {"type": "object", "properties": fields, "required": required}
        said = {"name": self.name, "description": inspect.getdoc(type(self)) or "", "parameters": parameters}
        return {"type": "function", "function": said}


@dataclasses.dataclass(frozen=True)
class Functions(Tool):
    """One's own functions, called as JSON in the middle of a reply: after
    `<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>` stands `<tool_response>...`.

    A wrong call, and an error of the function, are answered in words, from which the model can learn."""

    functions: tuple[Function, ...]
    """The functions."""
    longest: int = 1_000
    """Maximum number of characters of an answer; the rest is left out."""

    @property
    def mark(self) -> str:
        return "</tool_call>"

    def check(self) -> None:
        names = [schema["function"]["name"] for schema in self.schemas]
        if not names or len(set(names)) < len(names):
            raise UserError(f"tools: got functions {', '.join(names) or 'none'}, must be some of different names")

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Schemas of all functions, to be shown to the model in its prompt."""
        return [function.schema for function in self.functions]

    def answer(self, text: str) -> str | None:
        _, start, call = text.removesuffix(self.mark).rpartition("<tool_call>")
        return f"<tool_response>{self._called(call)[: self.longest]}</tool_response>" if start else None

    def _called(self, call: str) -> str:
        known = {function.name: function for function in self.functions}
        try:
            said = json.loads(call)
            name, arguments = said["name"], said.get("arguments", {})
        except (ValueError, LookupError, TypeError, AttributeError):
            return 'error: must be {"name": ..., "arguments": {...}}'
        if name not in known:
            return f"error: no function {name}, must be one of {', '.join(known)}"
        if wrong := _mismatch(known[name].schema["function"]["parameters"], arguments):
            return f"error: {wrong}"
        try:
            found = known[name].run(**arguments)
            return found if isinstance(found, str) else json.dumps(found)
        except Exception as error:
            return f"error: {type(error).__name__}: {one_line(error)}"


def _mismatch(parameters: dict[str, Any], arguments: Any) -> str:
    """Reason why arguments do not fit the schema, or ""."""
    if not isinstance(arguments, dict):
        return "arguments must be an object"
    fields = parameters["properties"]
    if absent := [name for name in parameters["required"] if name not in arguments]:
        return f"{absent[0]} is missing"
    types = {kind: python for python, kind in KINDS.items()}
    for name, value in arguments.items():
        if name not in fields:
            return f"no parameter {name}, must be one of {', '.join(fields)}"
        kind = types[fields[name]["type"]]
        python = (int, float) if kind is float else kind
        fits = isinstance(value, python) and (kind is bool) == isinstance(value, bool)
        if not fits:
            return f"{name} must be of type {fields[name]['type']}"
    return ""


@dataclasses.dataclass(frozen=True)
class Python(Tool):
    """Programs in the sandbox of `gptjax.tasks.sandbox`: after "<python>print(2**10)</python>" stands
    "<output>1024</output>": what it printed, and its error if there is one. Each program begins anew."""

    seconds: float = 5.0
    """Time that a program may take."""
    memory: int = 512
    """Memory of a program, in MiB."""
    unconfined: bool = False
    """True: run programs also where the system has no sandbox for them, with limits of time and memory alone."""
    longest: int = 1_000
    """Maximum number of characters of an answer; the rest is left out."""

    @property
    def mark(self) -> str:
        return "</python>"

    def check(self) -> None:
        sandbox.run("", self.seconds, self.memory, self.unconfined)

    def answer(self, text: str) -> str | None:
        _, start, program = text.removesuffix(self.mark).rpartition("<python>")
        if not start:
            return None
        found = sandbox.run(program, self.seconds, self.memory, self.unconfined)
        said = "\n".join(part for part in (found.output.strip(), found.note) if part)
        return f"<output>{said[: self.longest]}</output>"
