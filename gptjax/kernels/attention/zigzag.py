"""Zigzag order of sharded sequences, which gives every device the same work under a causal mask (Llama 3,
arXiv:2407.21783, section 3.3.2).

Early queries see fewer keys than late ones. So a sequence is split into 2 n pieces for n devices, and device i computes
pieces i and 2 n - 1 - i:

    n = 4     pieces stored on each device     0 1 | 2 3 | 4 5 | 6 7
              pieces computed on it            0 7 | 1 6 | 2 5 | 3 4

A piece is sent directly to the device that computes it, and the result directly back.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.types import Array

Axes = tuple[str, ...]


def zigzag_order(n: int) -> np.ndarray:
    """int [n, 2]: the pieces that each of n devices computes."""
    first = np.arange(n)
    return np.stack([first, 2 * n - 1 - first], axis=1)


def zigzag_split(x: Array, axes: Axes) -> Array:
    """Exchange pieces, within `jax.shard_map`: the two [B, T, ...] that this device stores -> the two that it
    computes."""
    n = lax.axis_size(axes)
    low, high = (lax.ppermute(half, axes, pairs) for half, pairs in zip(jnp.split(x, 2, axis=1), _ways(n), strict=True))
    # First halves are even pieces. On even devices piece i, which comes first, is even.
    even = lax.axis_index(axes) % 2 == 0
    return jnp.concatenate([jnp.where(even, low, high), jnp.where(even, high, low)], axis=1)


def zigzag_merge(x: Array, axes: Axes) -> Array:
    """The inverse of `zigzag_split`."""
    first, second = jnp.split(x, 2, axis=1)
    even = lax.axis_index(axes) % 2 == 0
    halves = jnp.where(even, first, second), jnp.where(even, second, first)
    back = ([(there, here) for here, there in pairs] for pairs in _ways(lax.axis_size(axes)))
    return jnp.concatenate([lax.ppermute(half, axes, pairs) for half, pairs in zip(halves, back, strict=True)], axis=1)


def _ways(n: int) -> list[list[tuple[int, int]]]:
    """For the first halves and for the second halves: (device that stores it, device that computes it)."""
    return [[(i, min(piece, 2 * n - 1 - piece)) for i in range(n) for piece in [2 * i + half]] for half in (0, 1)]
