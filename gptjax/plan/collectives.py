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
from collections.abc import Sequence

from gptjax.plan import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FACTORS = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves bytes between devices."""

    kind: str
    """One of `KINDS`."""
    operand: int
    """Bytes of what one device gives, once."""
    group: int
    """Devices that take part together; slices, where it goes between them."""
    times: int
    """How often a step runs it: the trip counts of the loops that it is in."""
    between_slices: bool = False
    """Whether it goes over the network that slices have between them."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return self.times * self.operand * FACTORS[self.kind](self.group)


def sent(found: Sequence[Collective]) -> dict[str, float]:
    """Kind -> bytes that a device sends in a step."""
    total: dict[str, float] = collections.defaultdict(float)
    for one in found:
        total[one.kind] += one.sent
    return dict(total)


def collectives(program: hlo.Program) -> tuple[Collective, ...]:
    """Those of a compiled program. A loop without a known trip count counts once."""
    found: list[Collective] = []
    chains: set[str] = set()  # on TPU a collective may be spread over several fusions, which share its channel
    for run in program.runs():
        one, kind = run.instruction, run.instruction.opcode.removesuffix("-start")
        if kind == "send" and (slices := re.search(r'_xla_megascale_target="\{([\d,]+)\}', one.rest)) is not None:
            said = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
            kind = said[1].lower().replace("_", "-") if said else ""
            kind = kind if kind in KINDS else "collective-permute"
            found.append(Collective(kind, hlo.size(run.shapes[0]), slices[1].count(",") + 1, run.times, True))
            continue
        if kind not in KINDS:
            continue
        if "chain_id" in one.rest and (channel := re.search(r"channel_id=(\d+)", one.rest)) is not None:
            if channel[1] in chains:
                continue
            chains.add(channel[1])
        if run.within is not None and "all-reduce-scatter" in run.within.name:  # as a TPU's reduce-scatter is written
            kind = "reduce-scatter"
        operand = sum(hlo.size(shape) for shape in run.shapes)
        found.append(Collective(kind, operand, _group(one.rest), run.times))
    return tuple(found)


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
