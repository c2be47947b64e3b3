"""A roofline: how long a step takes at best, from what it computes, moves and sends, and what chips can do.

    compute       FLOPs of a chip's matrix products / peak
    memory        bytes that it moves / bandwidth of HBM
    interconnect  bytes that it sends within its slice / bandwidth of one axis of the torus, both ways; of one way where
                  the slice is too small to be a torus: a line takes twice as long as a ring
    network       bytes that it sends to other slices / its share of the network between them

A step takes between the longest of these, when all overlap, and their sum, when nothing does. Real steps lie
between too, or above: vector arithmetic, matrices of awkward sizes and waiting for input are not in it.
"""

from __future__ import annotations

import dataclasses

from gptjax.plan.collectives import sent
from gptjax.plan.compiled import Step
from gptjax.plan.topology import Target

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by what takes them."""

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def best(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def worst(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def estimate(step: Step, target: Target, devices: int) -> Estimate:
    """Of a compiled step that fits. `devices` may be more than chips: what a chip has, its devices share."""
    chip, per_chip = target.chip, devices / target.chips
    assert chip is not None
    own, others = ([c for c in step.collectives if c.between_slices == between] for between in (False, True))
    link = chip.link if target.wraps else chip.link / 2
    return Estimate(
        compute=per_chip * step.flops / chip.flops,
        memory=per_chip * step.moved / chip.bandwidth,
        interconnect=per_chip * sum(sent(own).values()) / link,
        network=per_chip * sum(sent(others).values()) / chip.network,
    )
