"""Roofline estimate of a step's time, from its FLOPs and bytes per chip and the chip's peak rates.

    compute       FLOPs of matrix products / peak FLOP/s
    memory        bytes moved / HBM bandwidth
    interconnect  bytes sent within the slice / bandwidth of one axis of the torus, both directions; one direction if
                  the slice is too small to be a torus, as a line takes twice as long as a ring
    network       bytes sent to other slices / the chip's share of the network between slices

A step takes between the maximum of these (everything overlaps) and their sum (nothing does). Real steps may take
longer: vector arithmetic, matrices of awkward sizes and waiting for input are not included.

The expected time takes kernels one after the other, each by its own roofline: a kernel that moves bytes does not
overlap with another that multiplies. Peak rates are reduced to `REACHED`. What is sent overlaps with the kernels.
"""

from __future__ import annotations

import dataclasses

from gptjax.plan.collectives import sent
from gptjax.plan.compiled import Step
from gptjax.plan.topology import Target

DAY = 86_400.0
REACHED = {"gpu": (0.7, 0.8), "tpu": (0.9, 0.9)}
"""Shares of peak FLOP/s and of memory bandwidth that good kernels reach: GPUs, fitted to the steps in docs/plan.md."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds per step, by resource."""

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
        """Name of the slowest resource."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def expected(step: Step, target: Target, devices: int) -> float:
    """Seconds per step, kernel by kernel."""
    chip, per_chip = target.chip, devices / target.chips
    assert chip is not None
    shares = REACHED["gpu" if target.is_gpu else "tpu"]
    flops, bandwidth = shares[0] * chip.flops, shares[1] * chip.bandwidth
    kernels = step.silent / flops + sum(max(k.flops / flops, k.moved / bandwidth) for k in step.kernels)
    times = estimate(step, target, devices)
    return max(per_chip * kernels, times.interconnect + times.network)


def estimate(step: Step, target: Target, devices: int) -> Estimate:
    """Estimate the time of a compiled step that fits. `devices` may exceed the number of chips: a chip's devices share
    its resources."""
    chip, per_chip = target.chip, devices / target.chips
    assert chip is not None
    within, between = ([c for c in step.collectives if c.between_slices == crosses] for crosses in (False, True))
    link = chip.link if target.wraps else chip.link / 2
    return Estimate(
        compute=per_chip * step.flops / chip.flops,
        memory=per_chip * step.moved / chip.bandwidth,
        interconnect=per_chip * sum(sent(within).values()) / link,
        network=per_chip * sum(sent(between).values()) / chip.network,
    )
