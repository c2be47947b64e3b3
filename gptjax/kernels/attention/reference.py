"""Reference attention, a direct transcription of the equation, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.kernels.attention.spec import Mask
from gptjax.types import Array


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
    """Attention by its equation, without dropout. Arguments as for `attention`."""
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
