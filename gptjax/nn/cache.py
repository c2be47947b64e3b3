"""Key/value cache for incremental decoding: an argument and a return value, never hidden state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of previous tokens, in S slots of which the first `length` are filled.

    All sequences of the batch fill the same slots: shorter prompts are padded on the left, with segment 0.
    """

    layers: tuple[Any, ...]
    """One entry per layer, as `SequenceMixer.init_cache` returns it: (keys, values) [B, K, S, H] for multi-head
    attention. Not stacked, to avoid copies at every token."""
    segments: Array
    """int32 [B, S], segment of each slot's token. 0: empty or padding, which no token attends to."""
    length: Array
    """int32 scalar, number of filled slots."""
    source_segments: Array | None = None
    """int32 [B, S'], segments of the source of an encoder-decoder. Tokens attend to their own segment."""

    @property
    def size(self) -> int:
        """S, number of slots."""
        return self.segments.shape[1]


def write(entry: Array, new: Array, start: Array | int, axis: int = -2) -> Array:
    """`entry` with the T tokens of `new` at `start` .. `start + T - 1` along `axis`."""
    return lax.dynamic_update_slice_in_dim(entry, new.astype(entry.dtype), start, axis)


def empty(layers: tuple[Any, ...], batch: int, size: int, sharding=None) -> Cache:
    """Empty cache with these empty entries. sharding: PartitionSpec of a [B, S] array."""
    segments = jnp.zeros((batch, size), jnp.int32, out_sharding=sharding)
    return Cache(layers, segments, jnp.zeros((), jnp.int32))
