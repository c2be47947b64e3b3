"""Scaled dot-product attention, softmax(q k^T / sqrt(H)) v under a mask (Vaswani et al. 2017, arXiv:1706.03762).

The mask is a specification, not an array, so that a fused kernel can use its structure; `reference` writes it out.
"""

from __future__ import annotations

import dataclasses
import functools

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
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Keys that are this many slots away or more are hidden: sliding-window attention, arXiv:2004.05150."""
    offset: Array | int = 0
    """Slot of the first query among the keys, int32 scalar."""
    query_segments: Array | None = None
    """int32 [B, T]: a query sees keys of its own segment only."""
    key_segments: Array | None = None
    """int32 [B, S]; given together with `query_segments`."""
    prefix: Array | None = None
    """bool [B, S]: keys that are seen from before them too, though `causal`: the prefix LM of arXiv:1910.10683."""

    def distance(self, queries: int, keys: int) -> Array:
        """int32 [T, S]: how many slots the key lies before the query; negative where it lies after."""
        return (self.offset + jnp.arange(queries))[:, None] - jnp.arange(keys)

    def visible(self, queries: int, keys: int) -> Array | None:
        """bool [B or 1, 1, T, S], or None when everything is visible."""
        conditions = []
        distance = self.distance(queries, keys)[None, None]
        if self.causal:
            before = distance >= 0
            conditions.append(before if self.prefix is None else before | self.prefix[:, None, None, :])
        if self.window is not None:
            conditions.append((distance if self.causal else jnp.abs(distance)) < self.window)
        if self.query_segments is not None and self.key_segments is not None:
            conditions.append((self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None])
        return functools.reduce(jnp.logical_and, conditions) if conditions else None


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> Array:
    """q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv], in q's dtype; scores and softmax in float32.

        score_ts = cap(scale q_t . k_s) + bias_ts                      cap(x) = softcap tanh(x / softcap)
        y_t = sum_s exp(score_ts) v_s / (exp(sink) + sum_s exp(score_ts))        over the s that the mask lets t see

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): N is a multiple of K and query head n reads key head
    n // (N / K). A query that sees no key returns the mean of v.

    bias     float [N, T, S], added to the scores (ALiBi, T5)
    sinks    float [N], a learned score that every query sees and that has no value (gpt-oss, arXiv:2309.17453)
    scale    1 / sqrt(H) when None
    softcap  bounds the scores (Gemma 2, arXiv:2408.00118)
    dropout  share of probabilities that are dropped when a key is given
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    groups = N // K
    scale = H**-0.5 if scale is None else scale
    # One product for each row and key head, over the queries of its whole group.
    q = q.reshape(B, T, K, groups, H).transpose(0, 2, 3, 1, 4).reshape(B, K, groups * T, H)
    visible = mask.visible(T, S)
    if visible is None:
        visible = jnp.ones((1, 1, T, S), bool)
    visible = jnp.tile(visible, (1, 1, groups, 1))
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape(K, groups, T, S).reshape(K, groups * T, S)  # in steps, for a mesh
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(K, groups), T, axis=1)[..., None]
    keep = None
    if key is not None and dropout > 0:
        keep = jax.random.bernoulli(key, 1 - dropout, (B, K, groups * T, S)) / (1 - dropout)
    y: Array = _attend(scale, softcap, q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), visible, bias, sinks, keep)
    return y.reshape(B, K, groups, T, v.shape[-1]).transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1])


def reference(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Attention as the equation says it, to test the others against."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    visible = mask.visible(q.shape[1], k.shape[1])
    if visible is not None:
        scores = jnp.where(visible, scores, -1e30)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], -1)
    p = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("BNTS,BSNH->BTNH", p, v)


# The gradient is written out to keep two things from happening. Differentiation would save more than the probabilities;
# and XLA's CPU backend would fuse the elementwise work into the products, which takes them off its fast path: that is
# what the barriers are for. Together they take a sixth off a training step.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    scale: float,
    softcap: float | None,
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    bias: Array | None,
    sinks: Array | None,
    keep: Array | None,
) -> Array:
    """q [B, K, T, H], k [B, K, S, H], v [B, K, S, Hv], visible bool [1 or B, 1, T, S], bias [K, T, S], sinks [K, T, 1],
    keep [B, K, T, S] -> [B, K, T, Hv]."""
    return _forward(scale, softcap, q, k, v, visible, bias, sinks, keep)[0]


def _forward(scale, softcap, q, k, v, visible, bias, sinks, keep):
    if q.shape[2] > 1:  # not in decoding, where it would copy the cache
        q, k, v = lax.optimization_barrier((q, k, v))
    scores = lax.optimization_barrier(_dot(q, k, 3, 3)) * scale
    tanh = None
    if softcap is not None:
        tanh = jnp.tanh(scores / softcap)
        scores = softcap * tanh
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(visible, scores, -1e30)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    sunk = None
    if sinks is not None:
        sunk = jnp.exp(sinks - top)
        total = total + sunk
        sunk = sunk / total
    p = lax.optimization_barrier(p * (1 / total))
    y = _dot((p if keep is None else p * keep).astype(v.dtype), v, 3, 2).astype(q.dtype)
    has_bias = None if bias is None else jnp.zeros(())
    return y, (q, k, v, keep, p, y, tanh, sunk, has_bias)


def _backward(scale, softcap, saved, g: Array):
    q, k, v, keep, p, y, tanh, sunk, has_bias = saved
    g = lax.optimization_barrier(g)
    dp = lax.optimization_barrier(_dot(g, v, 3, 3))
    dp, kept = (dp, p) if keep is None else (dp * keep, p * keep)
    # sum_s p_s dp_s = g . y, without another pass over the scores
    along = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    ds = p * (dp - along)
    dbias = None if has_bias is None else ds.sum(0)
    dsinks = None if sunk is None else -(sunk * along).sum(0)
    if tanh is not None:
        ds = ds * (1 - jnp.square(tanh))
    ds = lax.optimization_barrier((ds * scale).astype(q.dtype))
    dq, dk, dv = _dot(ds, k, 3, 2), _dot(ds, q, 2, 2), _dot(kept.astype(g.dtype), g, 2, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dbias, dsinks, None


_attend.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    """Contract axis i of a with axis j of b for each row and head, accumulated in float32."""
    return lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
