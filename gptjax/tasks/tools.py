"""Tools that a model uses in the middle of a reply: it writes a call, the tool's answer is put behind it, it goes on.

    Calculator().answer("12 boxes of 3 are <<12*3=")   # "36>>"

A tool is a frozen dataclass with `mark`, the text that ends a call, and `answer`; a new one is one class. A reply may
have several calls. Tokens of an answer are read by the model, and are not trained. `Python` runs programs in the
sandbox; one's own functions are in `functions.py`.
"""

from __future__ import annotations

import abc
import ast
import dataclasses
import operator
import re
from fractions import Fraction

from gptjax.tasks import sandbox

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
        return f"{'?' if found is None else written(found)}>>"


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


def written(value: Fraction) -> str:
    """A number as people write it: 24, 0.5, 3.333333333."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


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
        return f"<output>{found.said[: self.longest]}</output>"
