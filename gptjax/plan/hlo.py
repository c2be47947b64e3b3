"""Parser of a compiled program's text (`Compiled.as_text()`): its instructions and how often each is executed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_WITHIN = ("fusion", "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter")
"""Opcodes whose called computations are parts of the instruction."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    """Text after the operands: attributes and metadata."""
    root: bool
    """True: its computation returns this instruction's result."""

    @property
    def names(self) -> list[str]:
        """Names of the operands; `tuple.3#1` is element 1 of `tuple.3`."""
        return re.findall(r"%([\w.\-]+(?:#\d+)*)", self.operands)

    @property
    def target(self) -> str:
        """Target of a custom call; empty for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found is not None else ""


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction at one place of the program."""

    instruction: Instruction
    computation: dict[str, Instruction]
    """The instructions of its computation, by name; its operands are among them."""
    times: int
    """Executions: the product of the trip counts of the enclosing loops. A loop with an unknown count counts once."""
    within: Instruction | None
    """The fusion, reduction or similar instruction that contains it, if any."""

    def shape(self, operand: str) -> str:
        """Shape of an operand, given by its name or written out."""
        return shape_in(self.computation, operand)

    @property
    def shapes(self) -> list[str]:
        """Shapes of all operands."""
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
            if (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
                computations[header[2]] = current = {}
                entry = header[2] if header[1] else entry
            elif (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", line)) is not None:
                root, name, shape, opcode, after = found.groups()
                operands, rest = _split(after)
                current[name] = Instruction(name, shape, opcode, operands, rest, root=bool(root))
        return cls(entry, computations)

    def runs(self) -> Iterator[Run]:
        """All instructions in the text's order; those of loops and fusions where they are called."""
        yield from self._runs(self.entry, 1, None)

    def called(self, instruction: Instruction) -> list[str]:
        """Names of the computations that an instruction calls."""
        found = re.findall(
            r"(?:calls|to_apply|called_computations|branch_computations|\w+_computation|body)=(\{[^}]*\}|[^,\s]+)",
            instruction.rest,
        )
        return [name for name in re.findall(r"%?([\w.\-]+)", " ".join(found)) if name in self.computations]

    def _runs(self, name: str, times: int, within: Instruction | None) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Run(instruction, computation, times, within)
            trips = self._trips(instruction) if instruction.opcode == "while" else 1
            outer = within or (instruction if instruction.opcode in _WITHIN else None)
            for inner in self.called(instruction):
                yield from self._runs(inner, times * trips, outer)

    def _trips(self, loop: Instruction) -> int:
        """Trip count of a loop: the compiler's `known_trip_count`, else read from its condition. That must compare a
        counter from 0, element i of the loop's state, with its only constant; the body adds a constant, or 1, to the
        counter."""
        if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)) is not None:
            return int(known[1])
        names = (re.search(rf"{key}=%?([\w.\-]+)", loop.rest) for key in ("body", "condition"))
        body, condition = (self.computations[name[1]] if name else {} for name in names)
        ends = list(_integers(condition).values())
        if len(ends) != 1:
            return 1
        reads = [i.rest for i in condition.values() if i.opcode == "get-tuple-element"]
        index = re.search(r"index=(\d+)", reads[0]) if len(reads) == 1 else None
        state = result(body).names if result(body).opcode == "tuple" else []
        counter = state[int(index[1])] if index is not None and int(index[1]) < len(state) else ""
        constants = _integers(body)
        steps = [
            constants[name]
            for i in body.values()
            if i.name == counter and i.opcode == "add"
            for name in i.names
            if name in constants
        ]
        return math.ceil(ends[0] / max(sum(steps), 1))


def result(computation: dict[str, Instruction]) -> Instruction:
    """The root instruction of a computation, whose result it returns."""
    return next(instruction for instruction in computation.values() if instruction.root)


def shape_in(computation: dict[str, Instruction], operand: str) -> str:
    """Shape of an operand in a computation, given by its name or written out."""
    name, *elements = operand.split("#")
    shape = computation[name].shape if name in computation else operand
    for element in elements:
        shape = _elements(shape)[int(element)]
    return shape


def size(shape: str) -> int:
    """Bytes of an array such as `f32[8,16]{1,0}`, or of all arrays of a tuple."""
    return sum(size for size, _ in _arrays(shape))


def size_in_hbm(shape: str) -> int:
    """Bytes of the arrays in HBM; `S(1)` or higher in a layout means another memory of the TPU."""
    return sum(size for size, layout in _arrays(shape) if not re.search(r"S\([1-9]", layout))


def dimensions(shape: str) -> list[int]:
    """Dimensions of an array's shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _elements(shape: str) -> list[str]:
    """Shapes of a tuple's elements."""
    depth, found = 0, [""]
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [re.sub(r"/\*.*?\*/", "", element).strip() for element in found]


def _arrays(shape: str) -> Iterator[tuple[int, str]]:
    """(bytes, layout) of each array of a shape."""
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        bits = _BITS.get(dtype) if dtype in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", dtype))
        yield math.prod(int(n) for n in sizes.split(",") if n) * (bits or 0) // 8, layout


def _split(text: str) -> tuple[str, str]:
    """Split a text that starts inside a parenthesis into the part before its closing and the rest."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _integers(computation: dict[str, Instruction]) -> dict[str, int]:
    """The computation's constant integer scalars, by name."""
    scalars = (i for i in computation.values() if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape))
    return {i.name: int(i.operands) for i in scalars}
