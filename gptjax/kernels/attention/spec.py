"""Specification of attention: the mask, the options of scores and probabilities, and pages as a kernel wants them.

The mask is a specification, not an array, so that kernels can use its structure.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.types import Array, Key

SAVED = "attention"
"""Checkpoint name of the results that kernels' backward passes need, for `jax.checkpoint` policies to save."""

HEAD_SIZE = 128
"""Size of the heads in `PairedPages`, the width of a TPU's tiles."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Attention mask: the keys visible to each query, the AND of all conditions.

    Queries are at positions start .. start + T of the S keys. (jax.nn's `is_causal` aligns them at position 0, which is
    wrong for cached decoding.)
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    """Hide keys at later positions."""
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Hide keys at this distance or more: sliding-window attention, arXiv:2004.05150. None: no window."""
    offset: Array | int | None = None
    """Position of the first query among the keys, int32 scalar or, one per sequence, [B]. None: position 0, known at
    trace time, which fused kernels need; a number would become an array inside `jax.jit`."""
    query_segments: Array | None = None
    """int32 [B, T]: a query sees only keys of its own segment."""
    key_segments: Array | None = None
    """int32 [B, S]; given together with `query_segments`."""
    prefix: Array | None = None
    """bool [B, S]: keys visible to earlier queries too, despite `causal`: the prefix LM of arXiv:1910.10683."""
    pages: Array | None = None
    """int32 [B, M]: the pages of each sequence's keys and values, in order. These are then [P, S', K, H], P pages of S'
    each, and S = M S'. None: each sequence has its own, [B, S, K, H]."""

    @property
    def start(self) -> Array | int:
        """Position of the first query."""
        return 0 if self.offset is None else self.offset

    def distance(self, queries: int, keys: int) -> Array:
        """int32 [T, S], or [B, T, S] with an offset per sequence: position of the query minus that of the key."""
        return jnp.asarray(self.start)[..., None, None] + jnp.arange(queries)[:, None] - jnp.arange(keys)

    def visible(self, queries: int, keys: int) -> Array | None:
        """The mask as bool [B or 1, 1, T, S]. None: every key is visible."""
        conditions = []
        distance = self.distance(queries, keys)[..., None, :, :]
        distance = distance if distance.ndim == 4 else distance[None]
        if self.causal:
            before = distance >= 0
            conditions.append(before if self.prefix is None else before | self.prefix[:, None, None, :])
        if self.window is not None:
            conditions.append(jnp.abs(distance) < self.window)
        if self.query_segments is not None and self.key_segments is not None:
            conditions.append((self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None])
        return functools.reduce(jnp.logical_and, conditions) if conditions else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """Options of scores and probabilities, documented at `attention`."""

    bias: Array | None = None
    sinks: Array | None = None
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    key: Key | None = None

    def scale_of(self, q: Array) -> float:
        """Factor of the scores: `scale`, or 1 / sqrt(H)."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairedPages:
    """Keys and values of P pages of S' slots, as the kernel "ragged" reads them: in heads of 128 numbers, each of which
    is made of smaller heads side by side. What is missing, of size or number, is padded with zeros."""

    pairs: Array
    """[P, S', 2 K', 128]: a slot has k_0, v_0, k_1, v_1, ..."""
    heads: int = dataclasses.field(metadata={"static": True})
    """K, number of key heads."""

    @staticmethod
    def empty(pages: int, slots: int, heads: int, size: int, dtype: str) -> PairedPages:
        """Pages for key heads of this number and size."""
        whole = heads // side_by_side(heads, size)
        whole = min(1 << (whole - 1).bit_length(), -(-whole // 8) * 8)  # 1, 2, 4, or a multiple of 8
        return PairedPages(jnp.zeros((pages, slots, 2 * whole, HEAD_SIZE), dtype), heads)

    def pair(self, k: Array, v: Array) -> Array:
        """Keys and values [B, T, K, H] as slots have them, [B, T, 2 K', 128]."""
        (B, T, K, H), whole = k.shape, self.pairs.shape[2] // 2
        together = side_by_side(K, H)
        pairs = jnp.stack([x.reshape(B, T, K // together, together * H) for x in (k, v)], axis=3)
        padding = (0, 0), (0, 0), (0, whole - pairs.shape[2]), (0, 0), (0, HEAD_SIZE - pairs.shape[4])
        return jnp.pad(pairs, padding).reshape(B, T, 2 * whole, HEAD_SIZE)


def side_by_side(heads: int, size: int) -> int:
    """Number of key heads that one of 128 numbers is made of."""
    count = HEAD_SIZE // size
    return count if count * size == HEAD_SIZE and heads % count == 0 else 1
