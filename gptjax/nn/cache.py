"""The key/value cache of incremental decoding: a value that goes in and comes out, never hidden state."""

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
    """Keys and values of the tokens read so far, in S slots of which the first `length` are filled.

    Every row of the batch fills the same slots: shorter prompts are padded on the left, and padding has segment 0.
    """

    layers: tuple[Any, ...]
    """One entry per layer, as `SequenceMixer.init_cache` returns it: (keys, values) [B, K, S, H] for multi-head
    attention. Not stacked, so that nothing is copied at every token."""
    segments: Array
    """int32 [B, S]: the segment of the token in each slot; 0 is empty or padding, which no real token sees."""
    length: Array
    """int32 scalar: how many slots are filled."""
    source_segments: Array | None = None
    """int32 [B, S']: the segments of the source, where a decoder reads one; tokens see what is of their own segment."""

    @property
    def size(self) -> int:
        """S, the number of slots."""
        return self.segments.shape[1]


def write(entry: Array, new: Array, start: Array | int, axis: int = -2) -> Array:
    """`entry` with the T tokens of `new` along `axis` at start .. start + T."""
    return lax.dynamic_update_slice_in_dim(entry, new.astype(entry.dtype), start, axis)


def empty(layers: tuple[Any, ...], batch: int, size: int, sharding=None) -> Cache:
    """An empty cache of these empty entries. `sharding`: the PartitionSpec of a [B, S] array."""
    segments = jnp.zeros((batch, size), jnp.int32, out_sharding=sharding)
    return Cache(layers, segments, jnp.zeros((), jnp.int32))
