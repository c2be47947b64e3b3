"""The platform that a program is traced for, possibly that of another machine."""

from __future__ import annotations

import jax
from jax.sharding import get_abstract_mesh


def backend() -> str:
    """Platform of the current mesh's devices: cpu, gpu or tpu. Without a mesh: that of jax's default device."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] (typed without its options)
    device = get_abstract_mesh().abstract_device or default
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
