"""The plain implementation, one chunk of queries at a time: the same numbers, with memory O(S) instead of O(T S).

The backward pass recomputes each chunk's scores. On a CPU that costs nothing from some thousand tokens on, because a
chunk's scores stay in the caches.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels.attention import plain, sharding
from gptjax.kernels.attention.spec import SAVED, Mask, Options
from gptjax.types import Array, PyTree

CHUNK = 128
"""Queries per chunk."""


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if q.shape[1] % CHUNK:
        return f"needs a multiple of {CHUNK} queries, got {q.shape[1]}"
    if options.dropout:
        return "has no dropout"
    if options.bias is not None and options.bias.ndim == 4:
        return "needs one bias for all sequences"
    return sharding.unsupported_reason(q, k, v)


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""

    @jax.checkpoint
    def attend(chunk: PyTree) -> Array:
        start, q, segments, bias = chunk
        shifted = dataclasses.replace(mask, offset=mask.start + start, query_segments=segments)
        return plain.attention(q, k, v, shifted, dataclasses.replace(options, bias=bias))

    starts = jnp.arange(0, q.shape[1], CHUNK)
    y = lax.map(attend, (starts, _split(q), _split(mask.query_segments), _split(options.bias)))
    return checkpoint_name(y.swapaxes(0, 1).reshape(*q.shape[:3], v.shape[-1]), SAVED)


def _split(x: Array | None) -> Array | None:
    """[B, T, ...] -> [T / CHUNK, B, CHUNK, ...]"""
    return None if x is None else x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)
