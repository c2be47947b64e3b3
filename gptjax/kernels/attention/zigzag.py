"""Rows that a mesh cuts, dealt so that a causal mask leaves every device the same to do (Llama 3, arXiv:2407.21783,
section 3.3.2).

Of n devices the first has the queries that see least, the last those that see most. So each row counts as 2 n pieces,
and device i computes for pieces i and 2 n - 1 - i:

    n = 4     lies on a device as      0 1 | 2 3 | 4 5 | 6 7
              is computed as           0 7 | 1 6 | 2 5 | 3 4

A piece goes straight to where it is computed, and what is made of it comes straight back.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.types import Array

Axes = tuple[str, ...]


def zigzag_order(n: int) -> np.ndarray:
    """int [n, 2]: the pieces of each of n devices."""
    first = np.arange(n)
    return np.stack([first, 2 * n - 1 - first], axis=1)


def zigzag_split(x: Array, axes: Axes) -> Array:
    """This device's two neighbouring pieces [B, T, ...] -> those that it computes, within `jax.shard_map`."""
    n = lax.axis_size(axes)
    low, high = (lax.ppermute(half, axes, pairs) for half, pairs in zip(jnp.split(x, 2, axis=1), _ways(n), strict=True))
    # What lay in a first half has an even number, and on even devices the piece i, which comes first, is even.
    even = lax.axis_index(axes) % 2 == 0
    return jnp.concatenate([jnp.where(even, low, high), jnp.where(even, high, low)], axis=1)


def zigzag_merge(x: Array, axes: Axes) -> Array:
    """The inverse of `deal`."""
    first, second = jnp.split(x, 2, axis=1)
    even = lax.axis_index(axes) % 2 == 0
    halves = jnp.where(even, first, second), jnp.where(even, second, first)
    back = ([(there, here) for here, there in pairs] for pairs in _ways(lax.axis_size(axes)))
    return jnp.concatenate([lax.ppermute(half, axes, pairs) for half, pairs in zip(halves, back, strict=True)], axis=1)


def _ways(n: int) -> list[list[tuple[int, int]]]:
    """For the first halves and for the second ones: (device where it lies, device that computes it)."""
    return [[(i, min(piece, 2 * n - 1 - piece)) for i in range(n) for piece in [2 * i + half]] for half in (0, 1)]
