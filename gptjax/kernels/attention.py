"""Scaled dot-product attention, softmax(q k^T / sqrt(H)) v under a mask (Vaswani et al. 2017, arXiv:1706.03762).

The mask is a specification, not an array, so that a fused kernel can use its structure; `reference` writes it out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

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
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    groups = N // K
    # One product for each row and key head, over the queries of its whole group.
    q = q.reshape(B, T, K, groups, H).transpose(0, 2, 3, 1, 4).reshape(B, K, groups * T, H)
    visible = mask.visible(T, S)
    if visible is None:
        visible = jnp.ones((1, 1, T, S), bool)
    keep = None
    if key is not None and dropout > 0:
        keep = jax.random.bernoulli(key, 1 - dropout, (B, K, groups * T, S)) / (1 - dropout)
    y = _attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), jnp.tile(visible, (1, 1, groups, 1)), keep)
    return y.reshape(B, K, groups, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def reference(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """Attention as the equation says it, to test `attention` against."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    visible = mask.visible(q.shape[1], k.shape[1])
    if visible is not None:
        scores = jnp.where(visible, scores, -1e30)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1), v)


# The gradient is written out to keep two things from happening. Differentiation would save more than the probabilities;
# and XLA's CPU backend would fuse the elementwise work into the products, which takes them off its fast path: that is
# what the barriers are for. Together they take a sixth off a training step.


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, visible: Array, keep: Array | None) -> Array:
    """q [B, K, T, H], k and v [B, K, S, H], visible bool [1 or B, 1, T, S], keep [B, K, T, S] -> [B, K, T, H]."""
    return _forward(q, k, v, visible, keep)[0]


def _forward(q: Array, k: Array, v: Array, visible: Array, keep: Array | None):
    q, k, v = lax.optimization_barrier((q, k, v))
    scores = lax.optimization_barrier(_dot(q, k, 3, 3)) * q.shape[-1] ** -0.5
    scores = jnp.where(visible, scores, -1e30)
    p = jnp.exp(scores - scores.max(-1, keepdims=True))
    p = lax.optimization_barrier(p * (1 / p.sum(-1, keepdims=True)))
    y = _dot((p if keep is None else p * keep).astype(v.dtype), v, 3, 2).astype(q.dtype)
    return y, (q, k, v, keep, p, y)


def _backward(saved, g: Array):
    q, k, v, keep, p, y = saved
    g = lax.optimization_barrier(g)
    dp = lax.optimization_barrier(_dot(g, v, 3, 3))
    dp, kept = (dp, p) if keep is None else (dp * keep, p * keep)
    # sum_s p_s dp_s = g . y, without another pass over the scores
    along = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    ds = lax.optimization_barrier((p * (dp - along) * q.shape[-1] ** -0.5).astype(q.dtype))
    dq, dk, dv = _dot(ds, k, 3, 2), _dot(ds, q, 2, 2), _dot(kept.astype(g.dtype), g, 2, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    """Contract axis i of a with axis j of b for each row and head, accumulated in float32."""
    return lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
