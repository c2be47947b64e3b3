"""Attention to keys and values in pages (Kwon et al. 2023, arXiv:2309.06180), a block of pages at a time with a running
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

A sequence's result has the same bits whatever the others are: blocks are at fixed positions, and one without a visible
key changes nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from gptjax.kernels.attention import sharding
from gptjax.kernels.attention.plain import dot
from gptjax.kernels.attention.spec import Mask, Options, PairedPages
from gptjax.types import Array

BLOCK = 64
"""Minimum number of keys per block."""


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if mask.pages is None:
        return "needs a page table"
    if isinstance(k, PairedPages):
        return "needs keys and values apart"
    if not mask.causal or mask.prefix is not None or mask.key_segments is not None:
        return "needs a causal mask without prefix and segments of keys"
    return "has no dropout" if options.dropout else None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`; q [B, T, N, H], k [P, S', K, H], v [P, S', K, Hv]. On a mesh the heads
    may be sharded, those of the queries alone too."""
    assert mask.pages is not None
    start, groups, scale = (
        jnp.broadcast_to(jnp.asarray(mask.start), len(q)),
        q.shape[2] // k.shape[2],
        options.scale_of(q),
    )
    by_head = sharding.head_axes(q)
    pool = "..K." if sharding.head_axes(k) else "...."
    bias = None if options.bias is None else "NTS".rjust(options.bias.ndim, ".").replace("S", ".")
    sinks = None if options.sinks is None else "N"

    def kernel(q, k, v, pages, start, bias, sinks):
        heads = None
        if by_head and pool == "....":
            heads = (lax.axis_index(by_head) * q.shape[2] + jnp.arange(q.shape[2])) // groups
        return _attention(q, k, v, pages, start, bias, sinks, heads, mask.window, scale, options.softcap)

    arrays = q, k, v, mask.pages, start, options.bias, options.sinks
    return sharding.on_each_device(kernel, ("BTN.", pool, pool, "..", ".", bias, sinks), *arrays)


def _attention(
    q: Array,
    k: Array,
    v: Array,
    pages: Array,
    start: Array,
    bias: Array | None,
    sinks: Array | None,
    heads: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Array:
    """`attention` on one device. heads int32 [N]: key head of each query head; None: in groups of N / K."""
    (B, T, N, H), page = q.shape, k.shape[1]
    K, width = N if heads is not None else k.shape[2], v.shape[-1]
    groups = N // K
    # As they lie in memory: of another order, or with an axis of one head, XLA would make a copy.
    one = k.shape[2] == 1
    k, v = (x[:, :, 0] if one else x.swapaxes(1, 2) for x in (k, v))
    count = -(-BLOCK // page)  # pages of a block
    size = count * page
    blocks = -(-pages.shape[1] // count)
    pages = jnp.pad(pages, ((0, 0), (0, blocks * count - pages.shape[1])))
    if bias is not None:
        rows = bias.shape[:-3]
        bias = jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((0, blocks * size - bias.shape[-1]),))
        bias = bias.astype(jnp.float32).reshape(*rows, K, groups, T, -1).reshape(*rows, K, groups * T, -1)
    # One product per sequence and key head, over all queries of the group.
    q = q.reshape(B, T, K, groups, H).transpose(0, 2, 3, 1, 4).reshape(B, K, groups * T, H)
    position = jnp.tile(start[:, None] + jnp.arange(T), (1, groups))[:, None, :, None]  # [B, 1, G T, 1]

    def read(pool: Array, ids: Array) -> Array:
        """[P, K, S', H] -> a block's [B, K, S, H]; of one head the pool is [P, S', H]."""
        block = pool[ids][:, None] if one else pool[ids].swapaxes(1, 2)
        block = block if heads is None else block[:, heads]
        return block.reshape(B, K, size, pool.shape[-1])

    def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, y = carry
        ids = lax.dynamic_slice_in_dim(pages, i * count, count, axis=1)
        scores = dot(q, read(k, ids), 3, 3) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if bias is not None:
            scores = scores + lax.dynamic_slice_in_dim(bias, i * size, size, axis=-1)
        distance = position - (i * size + jnp.arange(size))
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(visible, scores, -jnp.inf)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))
        p = jnp.where(visible, jnp.exp(scores - higher), 0)
        keep = jnp.exp(top - higher)
        total = total * keep + p.sum(-1, keepdims=True)
        return higher, total, y * keep + dot(p.astype(v.dtype), read(v, ids), 3, 2)

    shape = B, K, groups * T, 1
    top, total = jnp.full(shape, LOWEST), jnp.zeros(shape)
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(K, groups), T, axis=1)[..., None]
        top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape)
    first = 0 if window is None else jnp.maximum(start.min() - window + 1, 0) // size
    last = (start.max() + T - 1) // size
    carry = top, total, jnp.zeros((B, K, groups * T, width))
    _, total, y = lax.fori_loop(first, jnp.minimum(last + 1, blocks), block, carry)
    y = (y / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(q.dtype)
    return y.reshape(B, K, groups, T, width).transpose(0, 3, 1, 2, 4).reshape(B, T, N, width)


LOWEST = -1e30
"""Start of the running maximum: finite, so that a difference of two is a number."""
