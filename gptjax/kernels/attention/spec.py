"""What attention is asked for: which keys a query sees, and what is done to the scores.

The mask is a specification, not an array, so that a kernel can use its structure.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.types import Array, Key

SAVED = "attention"
"""What kernels call the results that their backward pass needs, for `jax.checkpoint` policies to keep."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see: the AND of what is set.

    Queries are the slots start .. start + T of the S key slots. (jax.nn's `is_causal` aligns them at slot 0, which is
    wrong for cached decoding.)
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    """Keys at later slots are hidden."""
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Keys that are this many slots away or more are hidden: sliding-window attention, arXiv:2004.05150."""
    offset: Array | int | None = None
    """Slot of the first query among the keys, int32 scalar. None: slot 0, known when the program is made, which fused
    kernels need; a number would be an array inside of `jax.jit`."""
    query_segments: Array | None = None
    """int32 [B, T]: a query sees keys of its own segment only."""
    key_segments: Array | None = None
    """int32 [B, S]; given together with `query_segments`."""
    prefix: Array | None = None
    """bool [B, S]: keys that are seen from before them too, though `causal`: the prefix LM of arXiv:1910.10683."""

    @property
    def start(self) -> Array | int:
        """Slot of the first query."""
        return 0 if self.offset is None else self.offset

    def distance(self, queries: int, keys: int) -> Array:
        """int32 [T, S]: how many slots the key lies before the query; negative where it lies after."""
        return (self.start + jnp.arange(queries))[:, None] - jnp.arange(keys)

    def visible(self, queries: int, keys: int) -> Array | None:
        """bool [B or 1, 1, T, S], or None when everything is visible."""
        conditions = []
        distance = self.distance(queries, keys)[None, None]
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
    """What is done to scores and probabilities; `attention` says what each does."""

    bias: Array | None = None
    sinks: Array | None = None
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    key: Key | None = None

    def scale_of(self, q: Array) -> float:
        """What scores are multiplied by: `scale`, or 1 / sqrt(H)."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale
