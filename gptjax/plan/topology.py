"""What a plan is for: chips that need not be here, made into devices that programs can be compiled for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from gptjax.plan.chips import CHIPS, Chip
from gptjax.types import UserError

TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one program could hold
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; libtpu asks the machine for its own otherwise
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """`v5p:4x4x4` (a slice of that shape) or `cpu:8` (eight virtual devices)."""

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises UserError for what is no target."""
        kind, _, sizes = text.partition(":")
        dimensions = 1 if kind == "cpu" else CHIPS[kind].dimensions if kind in CHIPS else 0
        if not dimensions or not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), sizes):
            raise UserError(
                f"on: got {text!r}, must be cpu:N, or a slice's generation and shape in chips: v5e:4x4, v6e:16x16, "
                "v4:2x2x2, v5p:4x4x4 or tpu7x:4x4x4, say"
            )
        return cls(kind, tuple(map(int, sizes.split("x"))))

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip | None:
        """What is known of the chip; none for a CPU."""
        return CHIPS.get(self.kind)

    def prepare(self) -> None:
        """Call before jax first asks for a device: libtpu and XLA read their environment then."""
        import jax

        jax.config.update("jax_platforms", "cpu")  # everything is compiled here, on the CPU
        jax.config.update("jax_enable_compilation_cache", False)  # nothing here runs what is for another machine
        if self.kind == "cpu":
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.chips}".strip()
        else:
            os.environ.update(TPU_ENVIRONMENT)

    def devices(self) -> list[Any]:
        """Devices to compile for: jax's own where the target is a CPU, descriptions else. Raises UserError where libtpu
        is absent or knows no such slice."""
        import jax
        from jax.experimental import topologies

        if self.kind == "cpu":
            if jax.device_count() < self.chips:
                raise UserError(f"on: got {self}, must be at most cpu:{jax.device_count()}: jax started with that many")
            return jax.devices()[: self.chips]
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"on: got {self}, which needs libtpu to compile for: pip install 'gptjax[plan]'")
        for name in (self.kind, self.kind.upper()):
            with contextlib.suppress(Exception):
                return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{self._size}").devices)
        raise UserError(f"on: got {self}, must be a shape that {self.kind} slices come in, such as {self._example}")

    @property
    def _size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def _example(self) -> str:
        return "2x2" if len(self.shape) == 2 else "2x2x1"
