"""Specification of attention: the mask and the options of scores and probabilities.

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
