"""Memory, bandwidths and prices of TPU chips and GPUs, for estimates. Peak FLOP/s: `gptjax/monitor/chips.py`."""

from __future__ import annotations

import dataclasses

from gptjax.monitor.chips import PEAKS
from gptjax.plan.gpus import GPUS

PRICED = "2025-10, not verified"
"""Date of the prices below: on demand, in the United States, without discounts. They were written from memory, not
looked up, and prices change and differ by region: check cloud.google.com/tpu/pricing before you spend. GPUs: Amazon's
instances p4de, p5, p5en and p6-b200; other clouds ask a third of that."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures per chip, even if jax presents the chip as several devices."""

    name: str
    flops: float
    """Peak bfloat16 FLOP/s."""
    memory: float
    """HBM in bytes, as published; the compiler reserves some of it."""
    bandwidth: float
    """HBM bandwidth, bytes/s."""
    link: float
    """Interconnect, bytes/s that a chip sends along one axis of the torus, both directions together. A GPU: NVLink,
    one direction."""
    network: float
    """Network between slices or between boxes of GPUs, bytes/s per chip: its share of the host's network."""
    price: float
    """US dollars per hour, on demand."""
    dimensions: int
    """Number of dimensions of the torus, as in a topology's name: 2 for v5e:4x4, 3 for v5p:4x4x4, 1 for h100:8."""
    devices: int = 1
    """Number of jax devices per chip."""


# Memory and its bandwidth: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Links: twice the one-way bandwidth of
# jax-ml.github.io/scaling-book/tpus. v5p and tpu7x were checked in part, the others not.
# Network: the v5p page gives 50 Gbps per chip, the v5e page 2 x 100 Gbps per host of 8 chips (both read 2026-11). From
# memory: v6e 4 x 200 Gbps per 8 chips, tpu7x 100 Gbps per chip. For v4 nothing is published; v5p's figure is assumed.
CHIPS = {
    "v4": Chip("TPU v4", PEAKS["TPU v4"].flops, 32 * 2**30, 1.228e12, 0.9e11, 6.25e9, 3.22, 3),
    "v5e": Chip("TPU v5e", PEAKS["TPU v5e"].flops, 16 * 2**30, 0.819e12, 0.9e11, 3.125e9, 1.20, 2),
    "v5p": Chip("TPU v5p", PEAKS["TPU v5p"].flops, 95 * 2**30, 2.765e12, 1.8e11, 6.25e9, 4.20, 3),
    "v6e": Chip("TPU v6e (Trillium)", PEAKS["TPU v6e"].flops, 32 * 2**30, 1.640e12, 1.8e11, 12.5e9, 2.70, 2),
    "tpu7x": Chip("TPU7x (Ironwood)", PEAKS["TPU7x"].flops, 192 * 2**30, 7.380e12, 2.0e11, 12.5e9, 12.00, 3, 2),
} | {
    # NVLink: nvidia.com/en-us/data-center/nvlink, halved to one direction. Network: p4de has 400 Gbps, the others
    # 3,200 Gbps per 8 GPUs.
    kind: Chip(f"NVIDIA {kind.upper()}", PEAKS[kind.upper()].flops, gpu.memory, gpu.bandwidth, link, network, price, 1)
    for (kind, gpu), link, network, price in zip(
        GPUS.items(),
        (3.0e11, 4.5e11, 4.5e11, 9.0e11),
        (6.25e9, 50e9, 50e9, 50e9),
        (3.43, 6.88, 7.91, 14.24),
        strict=True,
    )
}
