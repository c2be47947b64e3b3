"""Peak FLOP/s of accelerators: the one table behind utilisation and plans."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak rate of dense bfloat16 matrix multiplication, as published by the chip's maker."""

    flops: float
    """FLOP/s of the chip."""
    source: str
    """Address of the publication."""
    kinds: tuple[str, ...] = ()
    """Other names of the chip in `jax.Device.device_kind`."""
    devices: int = 1
    """Number of jax devices per chip."""


PEAKS = {
    "TPU v2": Peak(45e12, "cloud.google.com/tpu/docs/v2", devices=2),
    "TPU v3": Peak(123e12, "cloud.google.com/tpu/docs/v3", devices=2),
    "TPU v4": Peak(275e12, "cloud.google.com/tpu/docs/v4"),
    "TPU v5e": Peak(197e12, "cloud.google.com/tpu/docs/v5e", ("TPU v5 lite",)),
    "TPU v5p": Peak(459e12, "cloud.google.com/tpu/docs/v5p", ("TPU v5",)),
    "TPU v6e": Peak(918e12, "cloud.google.com/tpu/docs/v6e", ("TPU v6 lite",)),
    "TPU7x": Peak(2307e12, "cloud.google.com/tpu/docs/tpu7x", devices=2),
    # NVIDIA's tables give figures "with sparsity": halved here.
    "A10": Peak(125e12, "nvidia.com/en-us/data-center/products/a10-gpu"),
    "A100": Peak(312e12, "nvidia.com/en-us/data-center/a100"),
    "L4": Peak(121e12, "nvidia.com/en-us/data-center/l4"),
    "L40S": Peak(362e12, "nvidia.com/en-us/data-center/l40s"),
    "H100 PCIe": Peak(756e12, "nvidia.com/en-us/data-center/h100"),
    "H100 NVL": Peak(835e12, "nvidia.com/en-us/data-center/h100"),
    "H100": Peak(989e12, "nvidia.com/en-us/data-center/h100"),
    "GH200": Peak(989e12, "nvidia.com/en-us/data-center/grace-hopper-superchip"),
    "H200": Peak(989e12, "nvidia.com/en-us/data-center/h200"),
    "B200": Peak(2250e12, "nvidia.com/en-us/data-center/dgx-b200"),
    "GB200": Peak(2500e12, "nvidia.com/en-us/data-center/gb200-nvl72"),
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one jax device, by its `jax.Device.device_kind`. None: unknown."""
    kinds = {kind: peak for name, peak in PEAKS.items() for kind in (name, *peak.kinds)}
    found = [kind for kind in kinds if re.search(rf"\b{kind}\b", device_kind, re.IGNORECASE)]
    if not found:
        return None
    peak = kinds[max(found, key=len)]
    return peak.flops / peak.devices
