"""The table of chips: a device is found by what jax calls it, and by nothing that only begins like it."""

from __future__ import annotations

import pytest

from gptjax.monitor.chips import PEAKS, peak_flops
from gptjax.plan.chips import CHIPS


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v3", 61.5e12),  # a device is half of a chip
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, peak):
    assert peak_flops(kind) == peak


def test_every_peak_has_a_source_and_every_planned_chip_a_peak():
    assert all("." in peak.source for peak in PEAKS.values())
    assert {chip.flops for chip in CHIPS.values()} <= {peak.flops for peak in PEAKS.values()}
