"""What TPU chips hold, move and cost, beside their peak: what estimates are made from."""

from __future__ import annotations

import dataclasses

from gptjax.monitor.chips import PEAKS

PRICED = "2025-10, not verified"
"""When the prices below are of: on demand, in the United States, without discounts. They were written from memory, not
looked up, and prices change and differ by region: check cloud.google.com/tpu/pricing before you spend."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip; what it can do is per chip, also where jax sees it as several devices."""

    name: str
    flops: float
    """Peak bfloat16 FLOP/s."""
    memory: float
    """HBM, bytes, as published; the compiler keeps some of it."""
    bandwidth: float
    """HBM, bytes/s."""
    link: float
    """Interconnect, bytes/s that a chip sends along one axis of a torus, both ways together."""
    network: float
    """Bytes/s that a chip sends to those of other slices: its share of the host's network."""
    price: float
    """US dollars an hour, on demand."""
    dimensions: int
    """Of the torus, and of a topology's name: v5e:4x4, v5p:4x4x4."""


# Memory and its bandwidth are as cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} publishes them, links twice
# the one-way bandwidth of jax-ml.github.io/scaling-book/tpus; v5p and tpu7x were checked in part, the others not.
# Network: the v5p page has 50 Gbps a chip, the v5e page 2 x 100 Gbps for a host of 8 (both read 2026-11); v6e is 4 x
# 200 Gbps for 8 and tpu7x 100 Gbps, from memory; for v4 nothing is published, and it is assumed to be as v5p.
CHIPS = {
    "v4": Chip("TPU v4", PEAKS["TPU v4"].flops, 32 * 2**30, 1.228e12, 0.9e11, 6.25e9, 3.22, 3),
    "v5e": Chip("TPU v5e", PEAKS["TPU v5e"].flops, 16 * 2**30, 0.819e12, 0.9e11, 3.125e9, 1.20, 2),
    "v5p": Chip("TPU v5p", PEAKS["TPU v5p"].flops, 95 * 2**30, 2.765e12, 1.8e11, 6.25e9, 4.20, 3),
    "v6e": Chip("TPU v6e (Trillium)", PEAKS["TPU v6e"].flops, 32 * 2**30, 1.640e12, 1.8e11, 12.5e9, 2.70, 2),
    "tpu7x": Chip("TPU7x (Ironwood)", PEAKS["TPU7x"].flops, 192 * 2**30, 7.380e12, 2.0e11, 12.5e9, 12.00, 3),
}
