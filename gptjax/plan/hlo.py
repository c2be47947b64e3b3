"""A compiled program, read from its text (`Compiled.as_text()`): its instructions, and how often each of them runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_WITHIN = ("fusion", "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter")
"""What calls other instructions as parts of itself."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    """All that follows the operands."""
    root: bool
    """Whether it is what its computation returns."""

    @property
    def names(self) -> list[str]:
        """Of the operands."""
        return re.findall(r"%([\w.\-]+)", self.operands)


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction where the program runs it."""

    instruction: Instruction
    around: dict[str, Instruction]
    """By name, those of the same computation: operands are among them."""
    times: int
    """How often: the trip counts of the loops that it is in. A loop without a known one counts once."""
    within: Instruction | None
    """The fusion, reduction or the like that it is a part of."""

    def shape(self, operand: str) -> str:
        """Of an operand by its name, or written out where a program has it so."""
        found = self.around.get(operand)
        return operand if found is None else found.shape

    @property
    def shapes(self) -> list[str]:
        """Of all operands."""
        return [self.shape(name) for name in self.instruction.names]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name."""

    entry: str
    computations: dict[str, dict[str, Instruction]]

    @classmethod
    def parse(cls, text: str) -> Program:
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", {}
        for line in text.splitlines():
            if (start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
                computations[start[2]] = current = {}
                entry = start[2] if start[1] else entry
            elif (one := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", line)) is not None:
                operands, rest = _split(one[5])
                current[one[2]] = Instruction(one[2], one[3], one[4], operands, rest, root=bool(one[1]))
        return cls(entry, computations)

    def runs(self) -> Iterator[Run]:
        """Every instruction, in the text's order, those of loops and fusions where they are called."""
        yield from self._runs(self.entry, 1, None)

    def called(self, one: Instruction) -> list[str]:
        """The computations that an instruction calls."""
        found = re.findall(
            r"(?:calls|to_apply|called_computations|branch_computations|\w+_computation|body)=(\{[^}]*\}|[^,\s]+)",
            one.rest,
        )
        return [name for name in re.findall(r"%?([\w.\-]+)", " ".join(found)) if name in self.computations]

    def _runs(self, name: str, times: int, within: Instruction | None) -> Iterator[Run]:
        around = self.computations[name]
        for one in around.values():
            yield Run(one, around, times, within)
            trips = self._trips(one) if one.opcode == "while" else 1
            part_of = within or (one if one.opcode in _WITHIN else None)
            for inner in self.called(one):
                yield from self._runs(inner, times * trips, part_of)

    def _trips(self, loop: Instruction) -> int:
        """From what the compiler notes, else from a condition that compares a count from 0, place i of the loop's
        state, with the one constant there; the body adds another to it, or 1."""
        if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)) is not None:
            return int(known[1])
        names = (re.search(rf"{key}=%?([\w.\-]+)", loop.rest) for key in ("body", "condition"))
        body, condition = (self.computations[name[1]] if name else {} for name in names)
        ends = list(_integers(condition).values())
        if len(ends) != 1:
            return 1
        places = [i.rest for i in condition.values() if i.opcode == "get-tuple-element"]
        place = re.search(r"index=(\d+)", places[0]) if len(places) == 1 else None
        after = result(body).names if result(body).opcode == "tuple" else []
        count = after[int(place[1])] if place is not None and int(place[1]) < len(after) else ""
        constants = _integers(body)
        steps = [
            constants[name]
            for i in body.values()
            if i.name == count and i.opcode == "add"
            for name in i.names
            if name in constants
        ]
        return math.ceil(ends[0] / max(sum(steps), 1))


def result(computation: dict[str, Instruction]) -> Instruction:
    """What it returns."""
    return next(one for one in computation.values() if one.root)


def size(shape: str) -> int:
    """Bytes of `f32[8,16]{1,0}`, or of all the arrays in a tuple."""
    return sum(size for size, _ in _arrays(shape))


def size_in_hbm(shape: str) -> int:
    """Of those that are not in one of a TPU's other memories: `S(1)` in the layout says so."""
    return sum(size for size, layout in _arrays(shape) if not re.search(r"S\([1-9]", layout))


def dimensions(shape: str) -> list[int]:
    """Of an array."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _arrays(shape: str) -> Iterator[tuple[int, str]]:
    """The bytes of each array of a shape, and its layout."""
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        bits = _BITS.get(dtype) if dtype in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", dtype))
        yield math.prod(int(n) for n in sizes.split(",") if n) * (bits or 0) // 8, layout


def _split(text: str) -> tuple[str, str]:
    """What is within the parenthesis that text starts in, and what follows it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _integers(computation: dict[str, Instruction]) -> dict[str, int]:
    """Its constant scalars."""
    scalars = (i for i in computation.values() if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape))
    return {i.name: int(i.operands) for i in scalars}
