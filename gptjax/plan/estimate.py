"""A roofline: how long a step takes at best, from what it computes, moves and sends, and what chips can do.

    compute       FLOPs of the matrix products / (chips x peak)
    memory        (state read and written + temporaries written and read once) / bandwidth of HBM
    interconnect  bytes that a device sends / bandwidth of one axis of the torus, both ways

A step takes between the longest of the three, when all overlap, and their sum, when nothing does. Real steps lie
between too, or above: vector arithmetic, matrices of awkward sizes and waiting for input are not in it.
"""

from __future__ import annotations

import dataclasses

from gptjax.plan.chips import Chip
from gptjax.plan.collectives import sent
from gptjax.plan.compiled import Step

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by what takes them."""

    compute: float
    memory: float
    interconnect: float

    @property
    def best(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def worst(self) -> float:
        return self.compute + self.memory + self.interconnect

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def estimate(step: Step, chip: Chip, chips: int, devices: int) -> Estimate:
    """Of a compiled step that fits. `devices` may be more than `chips`: what a chip has, its devices share."""
    assert step.memory is not None
    per_chip = devices / chips
    moved = 2 * (step.memory.state + step.memory.temporaries)
    return Estimate(
        compute=step.flops / (chips * chip.flops),
        memory=per_chip * moved / chip.bandwidth,
        interconnect=per_chip * sum(sent(step.collectives).values()) / chip.link,
    )
