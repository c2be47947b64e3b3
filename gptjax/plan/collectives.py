"""Bytes that a compiled program sends between devices, read from its text.

With the operand's bytes on one device and n devices in a group, each device sends, in a ring algorithm:

    all-gather           bytes (n - 1)         the operand is one device's shard
    reduce-scatter       bytes (n - 1) / n
    all-reduce         2 bytes (n - 1) / n     reduce-scatter, then all-gather
    all-to-all           bytes (n - 1) / n
    collective-permute   bytes

In a group of GPUs in several boxes, g in each, every ring crosses the network at another GPU: a GPU sends 1 / g of its
bytes over the network, the others over NVLink.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

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
    """A collective instruction."""

    kind: str
    """One of `KINDS`."""
    operand: int
    """Bytes of the operand on one device."""
    group: int
    """Number of devices in a group; number of slices if `between_slices`."""
    times: int
    """Executions per step: the product of the trip counts of the enclosing loops."""
    between_slices: bool = False
    """True: it uses the network between slices or boxes, not the links between chips."""
    share: float = 1.0
    """Share of the bytes on these links."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step."""
        return self.times * self.operand * self.share * FACTORS[self.kind](self.group)


def sent(found: Sequence[Collective]) -> dict[str, float]:
    """Kind -> bytes that a device sends per step."""
    total: dict[str, float] = collections.defaultdict(float)
    for collective in found:
        total[collective.kind] += collective.sent
    return dict(total)


def collectives(program: hlo.Program, boxes: Sequence[int] = ()) -> tuple[Collective, ...]:
    """The collectives of a compiled program. A loop without a known trip count counts once.

    boxes  box of each GPU, in the mesh's order; a collective over several of them is one entry for NVLink, one for the
           network. Empty: slices of TPUs, whose programs tell
    """
    found: list[Collective] = []
    chains: set[str] = set()  # on TPU a collective may be split over several fusions with one channel
    for run in program.runs():
        rest, kind = run.instruction.rest, run.instruction.opcode.removesuffix("-start")
        if kind == "send" and (slices := re.search(r'_xla_megascale_target="\{([\d,]+)\}', rest)) is not None:
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
            kind = transfer[1].lower().replace("_", "-") if transfer else ""
            kind = kind if kind in KINDS else "collective-permute"
            found.append(Collective(kind, hlo.size(run.shapes[0]), slices[1].count(",") + 1, run.times, True))
            continue
        if kind not in KINDS:
            continue
        if "chain_id" in rest and (channel := re.search(r"channel_id=(\d+)", rest)) is not None:
            if channel[1] in chains:
                continue
            chains.add(channel[1])
        if run.within is not None and "calls=%all-reduce-scatter" in run.within.rest:  # a TPU's reduce-scatter
            kind = "reduce-scatter"
        operand = sum(hlo.size(shape) for shape in run.shapes)
        size, across = _group(rest), _boxes(rest, boxes)
        network = 1.0 if kind == "collective-permute" else across / size
        if across == 1 or network < 1:
            found.append(Collective(kind, operand, size, run.times, False, 1.0 if across == 1 else 1 - network))
        if across > 1:
            found.append(Collective(kind, operand, size, run.times, True, network))
    return tuple(found)


def _boxes(rest: str, boxes: Sequence[int]) -> int:
    """Most boxes over which a group of devices is spread."""
    if len(set(boxes)) <= 1:
        return 1
    return max(len({boxes[device] for device in group}) for group in _groups(rest, len(boxes)))


def _groups(rest: str, devices: int) -> list[list[int]]:
    """Devices of each group, in any of the forms that `_group` names. Without groups: all devices. A part of a mesh
    axis counts as the axis."""
    if (listed := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", rest)) is not None:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if (iota := re.search(r"replica_groups=\[(\d+),\d+\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)) is not None:
        return _iota(iota[2]).reshape(int(iota[1]), -1).tolist()
    if (
        named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))?[^{]*\{(.*?)\}", rest)
    ) is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else np.arange(devices)
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
        last = np.moveaxis(ids.reshape(list(sizes.values())), along, range(-len(along), 0))
        return last.reshape(-1, math.prod(list(sizes.values())[axis] for axis in along)).tolist()
    return [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """The devices of `[2,4]`, in that shape, or transposed: `[2,4]T(1,0)`."""
    shape, transposed = (re.findall(r"\d+", part) for part in f"{text}T".split("T")[:2])
    devices = np.arange(math.prod(map(int, shape))).reshape([int(n) for n in shape])
    return devices.transpose([int(n) for n in transposed]) if transposed else devices


def _group(rest: str) -> int:
    """Number of devices in a group. Two groups of two are written `{{0,1},{2,3}}`, `[2,2]<=[4]`, `mesh['a'=2,'b'=2]
    {'b'}` or, with another device order, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`. Permutations have pairs
    instead."""
    if (named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # A subaxis gives its own size: 'a':(1)2.
        return math.prod(
            int(subaxis or sizes[axis]) for axis, subaxis in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        )
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest)) is not None:
        return listed[1].count(",") + 1
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)) is not None:
        return int(iota[1])
    return 2 if "source_target_pairs" in rest else 1
