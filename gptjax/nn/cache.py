"""The key/value cache of incremental decoding: a value that goes in and comes out, never hidden state."""

from __future__ import annotations

import dataclasses

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

    keys: tuple[Array, ...]
    """One [B, K, S, H] a layer, in the order attention reads, and not stacked: nothing is copied at every token."""
    values: tuple[Array, ...]
    """One [B, K, S, H] a layer."""
    segments: Array
    """int32 [B, S]: the segment of the token in each slot; 0 is empty or padding, which no real token sees."""
    length: Array
    """int32 scalar: how many slots are filled."""

    @property
    def size(self) -> int:
        """S, the number of slots."""
        return self.segments.shape[1]


def write(slots: Array, new: Array, start: Array | int, axis: int) -> Array:
    """`slots` with the T entries of `new` along `axis` at start .. start + T."""
    return lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis)


def empty(layers: int, batch: int, size: int, kv_heads: int, head_size: int, dtype: str, sharding=None) -> Cache:
    """A cache with nothing in it. `sharding` is the PartitionSpec of a [B, K, S, H] array, None without a mesh."""

    def zeros() -> Array:
        return jnp.zeros((batch, kv_heads, size, head_size), dtype, out_sharding=sharding)

    rows = None if sharding is None else jax.sharding.PartitionSpec(sharding[0], None)
    return Cache(
        keys=tuple(zeros() for _ in range(layers)),
        values=tuple(zeros() for _ in range(layers)),
        segments=jnp.zeros((batch, size), jnp.int32, out_sharding=rows),
        length=jnp.zeros((), jnp.int32),
    )
