"""Attention in plain jax.numpy: every mask and option, on any device, with memory O(T S).

It is the fastest on a CPU up to some thousand tokens, and the fallback for inputs that no kernel supports.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels.attention import sharding
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    return "needs sequences that are not sharded" if sharding.sequence_axes(q) else None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    groups, scale = N // K, options.scale_of(q)
    bias, sinks = options.bias, options.sinks
    # One product per sequence and key head, over all queries of the group.
    q = q.reshape(B, T, K, groups, H).transpose(0, 2, 3, 1, 4).reshape(B, K, groups * T, H)
    visible = mask.visible(T, S)
    if visible is None:
        visible = jnp.ones((1, 1, T, S), bool)
    visible = jnp.tile(visible, (1, 1, groups, 1))
    if bias is not None:
        # Two reshapes, because the heads of the bias may be sharded.
        rows = bias.shape[:-3]
        bias = bias.astype(jnp.float32).reshape(*rows, K, groups, T, S).reshape(*rows, K, groups * T, S)
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(K, groups), T, axis=1)[..., None]
    keep = None
    if options.key is not None and options.dropout > 0:
        rate = options.dropout
        keep = jax.random.bernoulli(options.key, 1 - rate, (B, K, groups * T, S)) / (1 - rate)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    y: Array = _attend(scale, options.softcap, q, k, v, visible, bias, sinks, keep)
    return y.reshape(B, K, groups, T, v.shape[-1]).transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1])


# A custom gradient, for two reasons. Autodiff would save more than the probabilities; and without the barriers XLA's
# CPU backend would fuse the elementwise operations into the products, which then leave its fast path. Together they
# save a sixth of a training step.


def _forward(
    save: bool,
    scale: float,
    softcap: float | None,
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    bias: Array | None,
    sinks: Array | None,
    keep: Array | None,
) -> Any:
    """q [B, K, T, H], k [B, K, S, H], v [B, K, S, Hv], visible bool [1 or B, 1, T, S], bias [K, T, S] or [B, K, T, S],
    sinks [K, T, 1],    keep [B, K, T, S] -> y [B, K, T, Hv]; with `save`, y and what `_backward` needs."""
    if q.shape[2] > 1:  # not in decoding: the barrier would copy the cache
        q, k, v = lax.optimization_barrier((q, k, v))
    scores = lax.optimization_barrier(dot(q, k, 3, 3)) * scale
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
    y = dot((p if keep is None else p * keep).astype(v.dtype), v, 3, 2).astype(q.dtype)
    has_bias = None if bias is None else jnp.zeros(())
    return (y, (q, k, v, keep, p, y, tanh, sunk, has_bias)) if save else y


def _backward(scale, softcap, saved, g: Array):
    q, k, v, keep, p, y, tanh, sunk, has_bias = saved
    g = lax.optimization_barrier(g)
    dp = lax.optimization_barrier(dot(g, v, 3, 3))
    dp, kept = (dp, p) if keep is None else (dp * keep, p * keep)
    # sum_s p_s dp_s = g . y saves another pass over the scores
    along = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    ds = p * (dp - along)
    dbias = None if has_bias is None else ds.sum(0)
    dsinks = None if sunk is None else -(sunk * along).sum(0)
    if tanh is not None:
        ds = ds * (1 - jnp.square(tanh))
    ds = lax.optimization_barrier((ds * scale).astype(q.dtype))
    dq, dk, dv = dot(ds, k, 3, 2), dot(ds, q, 2, 2), dot(kept.astype(g.dtype), g, 2, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dbias, dsinks, None


_attend = jax.custom_vjp(functools.partial(_forward, False), nondiff_argnums=(0, 1))
_attend.defvjp(functools.partial(_forward, True), _backward)


def dot(a: Array, b: Array, i: int, j: int) -> Array:
    """Contract axis i of a with axis j of b for each sequence and head, accumulated in float32."""
    return lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
