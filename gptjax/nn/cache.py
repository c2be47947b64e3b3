"""Key/value cache for incremental decoding: an argument and a return value, never hidden state.

Rows are independent: each has its own number of tokens. The entries of a layer hold them row by row, or, with a page
table, in pages of a common pool, which rows can share (Kwon et al. 2023, arXiv:2309.06180).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.kernels.attention import Mask
from gptjax.kernels.attention.spec import PairedPages
from gptjax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the previous tokens of B rows, at most S each."""

    layers: tuple[Any, ...]
    """One entry per layer, as `SequenceMixer.init_cache` returns it: (keys, values) [B, K, S, H] for multi-head
    attention, [P, K, S', H] in P pages of S' slots, or `PairedPages`; states for recurrent layers. Not stacked, to
    avoid copies at every token."""
    length: Array
    """int32 [B], number of tokens of each row."""
    size: int = dataclasses.field(metadata={"static": True})
    """S, maximum number of tokens of a row."""
    pages: Array | None = None
    """int32 [B, M], pages of each row in order. None: each row has its own slots."""
    source_segments: Array | None = None
    """int32 [B, S'], segments of the source of an encoder-decoder. Tokens attend to their own segment."""


LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Dtype of 8 bits -> its largest number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledEntry:
    """Cached vectors of H numbers in 8 bits, each with its own scale. Indexing gives floats, so that attention reads
    blocks of it like those of an array."""

    codes: Array
    """[..., S, H], of a dtype in `LARGEST`."""
    scales: Array
    """float32 [..., S, 1]: largest magnitude of the vector over that of the dtype."""
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})
    """Dtype of the floats."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def swapaxes(self, i: int, j: int) -> ScaledEntry:
        """This entry with two axes exchanged, neither of them the last."""
        return dataclasses.replace(self, codes=self.codes.swapaxes(i, j), scales=self.scales.swapaxes(i, j))

    def __getitem__(self, index: Any) -> Array:
        return (self.codes[index].astype(jnp.float32) * self.scales[index]).astype(self.dtype)


def read(entry: PyTree, mask: Mask, dtype: DTypeLike) -> PyTree:
    """An entry as attention takes it: an array, or in pages an `ScaledEntry`, of which it reads a block at a time."""
    if not isinstance(entry, ScaledEntry):
        return entry
    entry = dataclasses.replace(entry, dtype=str(jnp.dtype(dtype)))
    return entry[...] if mask.pages is None else entry


def last(entry: Array, mask: Mask) -> Array:
    """Vectors [B, ..., H] of the last token before `mask.start` of each row, of an entry as `write` has it. Of a row
    without tokens they are undefined."""
    slots = jnp.maximum(jnp.reshape(mask.start, (-1,)) - 1, 0)
    if mask.pages is not None:
        pages = jnp.take_along_axis(mask.pages, slots[:, None] // entry.shape[-2], axis=1)[:, 0]
        return entry[pages, ..., slots % entry.shape[-2], :]
    return jax.vmap(lambda row, slot: row[..., slot, :])(entry, jnp.broadcast_to(slots, len(entry)))


def write(entry: PyTree, new: Array, mask: Mask) -> PyTree:
    """`entry` with T new tokens per row, after those that it has.

    entry  [B, ..., S, H], or [P, ..., S', H] in pages; an array or an `ScaledEntry`
    new    [B, T, ..., H]
    mask   `offset` int32 [B] or scalar, the number of tokens before; `query_segments` int32 [B, T], 0 for padding,
           which is not written; `pages`: what is not written goes to the last page, which must be nobody's
    """
    if isinstance(entry, ScaledEntry):
        new = new.astype(jnp.float32)
        dtype = entry.codes.dtype
        scales = jnp.max(jnp.abs(new), -1, keepdims=True) / LARGEST[str(dtype)]
        codes = jnp.clip(new / jnp.where(scales > 0, scales, 1), -LARGEST[str(dtype)], LARGEST[str(dtype)])
        codes = (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype)
        return ScaledEntry(write(entry.codes, codes, mask), write(entry.scales, scales, mask), entry.dtype)
    B, T = new.shape[:2]
    slots, size = _slots(mask, B, T), entry.shape[-2]
    new = new.astype(entry.dtype)
    if mask.pages is not None:
        page = _pages(mask, slots // size, nobody=entry.shape[0] - 1)
        if B == T == 1:  # a plain update, of which XLA's CPU backend makes no copy
            start = page[0, 0], *(0,) * (entry.ndim - 3), slots[0, 0] % size, 0
            return jax.lax.dynamic_update_slice(entry, jnp.moveaxis(new, 1, -2), start)
        return entry.at[page, ..., slots % size, :].set(new, mode="promise_in_bounds")
    if mask.query_segments is not None:
        slots = jnp.where(mask.query_segments > 0, slots, size)

    if B == T == 1:  # one row's next slot, seen by nobody before a token is there; XLA's CPU backend makes no copy
        return jax.lax.dynamic_update_slice_in_dim(
            entry, jnp.moveaxis(new, 1, -2), jnp.reshape(mask.start, ()), axis=-2
        )

    def row(entry: Array, new: Array, slots: Array) -> Array:
        return entry.at[..., slots, :].set(jnp.moveaxis(new, 0, -2), mode="drop")

    return jax.vmap(row)(entry, new, slots)


def write_pairs(entry: PairedPages, k: Array, v: Array, mask: Mask) -> PairedPages:
    """As `write`, of keys and values [B, T, K, H]."""
    nobody, size = entry.pairs.shape[0] - 1, entry.pairs.shape[1]
    new, slots = entry.pair(k, v).astype(entry.pairs.dtype), _slots(mask, *k.shape[:2])
    index = _pages(mask, slots // size, nobody), slots % size
    return dataclasses.replace(entry, pairs=entry.pairs.at[index].set(new, mode="promise_in_bounds"))


def _slots(mask: Mask, B: int, T: int) -> Array:
    """int32 [B, T], slots of T new tokens per row."""
    return jnp.broadcast_to(jnp.reshape(mask.start, (-1, 1)) + jnp.arange(T), (B, T))


def _pages(mask: Mask, number: Array, nobody: int) -> Array:
    """The page of each new token, the `number`th int32 [B, T] of its row; `nobody` for what is not to be written."""
    assert mask.pages is not None
    page = mask.pages.at[jnp.arange(len(number))[:, None], number].get(mode="fill", fill_value=nobody)
    return page if mask.query_segments is None else jnp.where(mask.query_segments > 0, page, nobody)


def empty(layers: tuple[Any, ...], batch: int, size: int, sharding=None) -> Cache:
    """Empty cache with these empty entries. sharding: PartitionSpec of a [B] array."""
    return Cache(layers, jnp.zeros(batch, jnp.int32, out_sharding=sharding), size)
