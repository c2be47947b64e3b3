"""Scaled dot-product attention, softmax(q k^T / sqrt(H)) v under a mask (Vaswani et al. 2017, arXiv:1706.03762).

The mask is a specification, not an array, so that a fused kernel can use its structure; `reference` writes it out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.types import Array, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see: the AND of what is set.

    Queries are the slots offset .. offset + T of the S key slots. (jax.nn's `is_causal` aligns them at slot 0, which is
    wrong for cached decoding.)
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    """Keys at later slots are hidden."""
    offset: Array | int = 0
    """Slot of the first query among the keys, int32 scalar."""
    query_segments: Array | None = None
    """int32 [B, T]: a query sees keys of its own segment only."""
    key_segments: Array | None = None
    """int32 [B, S]; given together with `query_segments`."""

    def visible(self, queries: int, keys: int) -> Array | None:
        """bool [B or 1, 1, T, S], or None when everything is visible."""
        visible = None
        if self.causal:
            slots = self.offset + jnp.arange(queries)
            visible = (slots[:, None] >= jnp.arange(keys))[None, None]
        if self.query_segments is not None and self.key_segments is not None:
            same = (self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None]
            visible = same if visible is None else visible & same
        return visible


def attention(q: Array, k: Array, v: Array, mask: Mask, dropout: float = 0.0, key: Key | None = None) -> Array:
    """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H], in q's dtype; scores and softmax in float32.

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): N is a multiple of K and query head n reads key head
    n // (N / K). `dropout` drops probabilities when a key is given. A query that sees no key returns the mean of v.
    """
    return reference(q, k, v, mask, dropout, key)


def reference(q: Array, k: Array, v: Array, mask: Mask, dropout: float = 0.0, key: Key | None = None) -> Array:
    """Attention as the equation says, with all T x S scores in memory."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    visible = mask.visible(T, S)
    if visible is not None:
        scores = jnp.where(visible[:, :, None], scores, -1e30)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if key is not None and dropout > 0:
        keep = jax.random.bernoulli(key, 1 - dropout, probabilities.shape)
        probabilities = jnp.where(keep, probabilities / (1 - dropout), 0)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v).reshape(B, T, N, H)
