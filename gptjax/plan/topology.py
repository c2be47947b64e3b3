"""Targets of a plan: descriptions of chips that need not be present, as devices to compile for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gptjax.plan import gpus
from gptjax.plan.chips import CHIPS, Chip
from gptjax.plan.compiler import in_child
from gptjax.types import UserError

T = TypeVar("T")
TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock protects a TPU, and there is none
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any value; without one libtpu queries the machine
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """`v5p:4x4x4` (a slice of that shape), `v5p:4x4x4*2` (two such slices), `h100:8` (a box of eight GPUs), `h100:8*2`
    (two such boxes) or `cpu:8` (eight virtual devices)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1
    """Number of slices, or boxes of GPUs."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse a target. Raises UserError if `text` is not one."""
        kind, _, sizes = text.partition(":")
        dimensions = 1 if kind == "cpu" else CHIPS[kind].dimensions if kind in CHIPS else 0
        shape, _, slices = sizes.partition("*")
        pattern = "x".join([r"[1-9]\d*"] * dimensions) + ("" if kind == "cpu" else r"(\*[1-9]\d*)?")
        if not dimensions or not re.fullmatch(pattern, sizes):
            raise UserError(
                f"on: got {text!r}, must be cpu:N, or a slice's generation and shape in chips, such as v5e:4x4, "
                "v6e:16x16, v4:2x2x2, v5p:4x4x4 or tpu7x:4x4x4; several slices: v5e:4x4*2; or GPUs: a100:N, h100:N, "
                "h200:N, b200:N; several boxes: h100:8*2"
            )
        return cls(kind, tuple(map(int, shape.split("x"))), int(slices or 1))

    def __str__(self) -> str:
        return f"{self.kind}:{self._size}" + (f"*{self.slices}" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def is_gpu(self) -> bool:
        return self.kind in gpus.GPUS

    @property
    def num_devices(self) -> int:
        """Number of jax devices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def wraps(self) -> bool:
        """True if every axis of a slice is a ring: in 2 dimensions, if it spans the pod (16 chips); in 3 dimensions, if
        it is a multiple of the cubes' side (4 chips). GPUs have a switch."""
        if self.is_gpu:
            return True
        return all(size == 16 if len(self.shape) == 2 else size % 4 == 0 for size in self.shape)

    @property
    def chip(self) -> Chip | None:
        """Figures of the chip. None: CPU."""
        return CHIPS.get(self.kind)

    def prepare(self) -> None:
        """Set up jax and the environment. Call it before jax first initialises a device: libtpu, the CUDA plugin and
        XLA read their environment then."""
        import jax

        jax.config.update("jax_platforms", "cpu")  # compilation runs on this machine's CPU
        jax.config.update("jax_enable_compilation_cache", False)  # programs for other machines never run here
        if self.kind == "cpu":
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.chips}".strip()
        else:
            os.environ.update(gpus.ENVIRONMENT if self.is_gpu else TPU_ENVIRONMENT)

    def devices(self) -> list[Any]:
        """Devices to compile for: jax's own for a CPU target, else descriptions. Raises UserError if libtpu or jax's
        CUDA plugin is not installed, or libtpu does not know the slice."""
        import jax
        from jax.experimental import topologies

        if self.kind == "cpu":
            if jax.device_count() < self.chips:
                raise UserError(
                    f"on: got {self}, must be at most cpu:{jax.device_count()}, the devices jax started with"
                )
            return jax.devices()[: self.chips]
        if self.is_gpu:
            return self._gpus()
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"on: got {self}, which needs libtpu for compilation: pip install 'gptjax[plan]'")
        # The two cores of a v4 are one device when programs run; libtpu needs an option to describe them so.
        options = {"chip_config_name": "megacore"} if self.kind == "v4" else {}
        for name in (self.kind, self.kind.upper()):
            with contextlib.suppress(Exception):
                topology = f"{name}:{self._size}"
                return list(topologies.get_topology_desc(topology, "tpu", num_slices=self.slices, **options).devices)
        raise UserError(f"on: got {self}, must be a shape of a {self.kind} slice, such as {self._example}")

    def call(self, function: Callable[[Sequence[Any]], T]) -> T:
        """function(devices). If the chips are elsewhere: in a process of its own, so that its compilations end with it,
        before they have generated machine code."""
        return function(self.devices()) if self.kind == "cpu" else in_child(lambda: function(self.devices()))

    def _gpus(self) -> list[Any]:
        from jax.experimental import topologies

        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
            raise UserError(
                f"on: got {self}, which needs CUDA's wheels for compilation: pip install 'gptjax[plan-gpu]'"
            )
        shape = f"1x{self.slices}x{self._size}"  # of which a box is a process
        description = gpus.GPUS[self.kind].description
        return list(topologies.get_topology_desc(shape, "cuda", target_config=description, topology=shape).devices)

    @property
    def _size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def _example(self) -> str:
        return "2x2" if len(self.shape) == 2 else "2x2x1"
