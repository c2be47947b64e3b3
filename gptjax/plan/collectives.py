"""What a compiled program sends between devices, read from its text.

Operand bytes are those of one device, n is the devices in a group, and what a device sends is that of a ring:

    all-gather           bytes (n - 1)         the operand is a device's part
    reduce-scatter       bytes (n - 1) / n
    all-reduce         2 bytes (n - 1) / n     reduce-scatter, then all-gather
    all-to-all           bytes (n - 1) / n
    collective-permute   bytes
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FACTORS = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves bytes between devices."""

    kind: str
    """One of `KINDS`."""
    operand: int
    """Bytes of what one device gives, once."""
    group: int
    """Devices that take part together."""
    times: int
    """How often a step runs it: the trip counts of the loops that it is in."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return self.times * self.operand * FACTORS[self.kind](self.group)


def sent(found: tuple[Collective, ...]) -> dict[str, float]:
    """Kind -> bytes that a device sends in a step."""
    total: dict[str, float] = collections.defaultdict(float)
    for one in found:
        total[one.kind] += one.sent
    return dict(total)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    """All that follows the operands."""

    @property
    def names(self) -> list[str]:
        """Of the operands."""
        return re.findall(r"%([\w.\-]+)", self.operands)


def collectives(text: str) -> tuple[Collective, ...]:
    """Those of a compiled program (`Compiled.as_text()`). A loop without a known trip count counts once."""
    entry, computations = _parse(text)
    found: list[Collective] = []
    chains: set[str] = set()  # on TPU a collective may be spread over several fusions, which share its channel

    def visit(name: str, times: int) -> None:
        shapes = {one.name: one.shape for one in computations[name]}
        for one in computations[name]:
            kind = one.opcode.removesuffix("-start")
            called = [c for c in re.findall(r"%?([\w.\-]+)", _called(one.rest)) if c in computations]
            if one.opcode == "while":
                body, condition = (re.search(rf"{key}=%?([\w.\-]+)", one.rest) for key in ("body", "condition"))
                if body and condition:
                    visit(body[1], times * _trips(one, computations[body[1]], computations[condition[1]]))
            elif kind in KINDS:
                if "chain_id" in one.rest and (channel := re.search(r"channel_id=(\d+)", one.rest)) is not None:
                    if channel[1] in chains:
                        continue
                    chains.add(channel[1])
                operand = sum(_bytes(shapes.get(x, x)) for x in one.names)
                found.append(Collective(kind, operand, _group(one.rest), times))
            elif one.opcode == "fusion" and "all-reduce-scatter" in one.name:  # how a TPU's reduce-scatter is written
                for inner in called:
                    local = {i.name: i.shape for i in computations[inner]}
                    for i in computations[inner]:
                        if i.opcode == "all-reduce":
                            operand = sum(_bytes(local.get(x, x)) for x in i.names)
                            found.append(Collective("reduce-scatter", operand, _group(i.rest), times))
            else:
                for inner in called:
                    visit(inner, times)

    visit(entry, 1)
    return tuple(found)


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if (start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            computations[start[2]] = current = []
            entry = start[2] if start[1] else entry
        elif (one := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", line)) is not None:
            operands, rest = _split(one[4])
            current.append(_Instruction(one[1], one[2], one[3], operands, rest))
    return entry, computations


def _split(text: str) -> tuple[str, str]:
    """What is within the parenthesis that text starts in, and what follows it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _called(rest: str) -> str:
    found = re.findall(
        r"(?:calls|to_apply|called_computations|branch_computations|\w+_computation)=(\{[^}]*\}|[^,\s]+)", rest
    )
    return " ".join(found)


def _trips(loop: _Instruction, body: list[_Instruction], condition: list[_Instruction]) -> int:
    """From what the compiler notes, else from a condition that compares a count from 0, place i of the loop's state,
    with the one constant there; the body adds another to it, or 1."""
    if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)) is not None:
        return int(known[1])
    ends = list(_integers(condition).values())
    if len(ends) != 1:
        return 1
    places = [i.rest for i in condition if i.opcode == "get-tuple-element"]
    place = re.search(r"index=(\d+)", places[0]) if len(places) == 1 else None
    after = body[-1].names if body[-1].opcode == "tuple" else []
    count = after[int(place[1])] if place is not None and int(place[1]) < len(after) else ""
    constants = _integers(body)
    steps = [
        constants[name] for i in body if i.name == count and i.opcode == "add" for name in i.names if name in constants
    ]
    return math.ceil(ends[0] / max(sum(steps), 1))


def _integers(computation: list[_Instruction]) -> dict[str, int]:
    """Its constant scalars."""
    scalars = (i for i in computation if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape))
    return {i.name: int(i.operands) for i in scalars}


def _group(rest: str) -> int:
    """Devices in a group: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `mesh['a'=2,'b'=2] {'b'}` and, in another order of devices,
    `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}` are two groups of two. Permutations have pairs instead."""
    if (named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # A part of an axis says its own size: 'a':(1)2.
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest)) is not None:
        return listed[1].count(",") + 1
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)) is not None:
        return int(iota[1])
    return 2 if "source_target_pairs" in rest else 1


def _bytes(shape: str) -> int:
    """Of `f32[8,16]{1,0}`, or of all the arrays in a tuple."""
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        bits = _BITS.get(dtype) if dtype in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", dtype))
        total += math.prod(int(n) for n in sizes.split(",") if n) * (bits or 0) // 8
    return total
