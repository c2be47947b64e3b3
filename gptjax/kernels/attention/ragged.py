"""Ragged paged attention: jax's Pallas kernel for TPUs, which reads the pages of each sequence where they are.

Its pages have a layout of their own, `PairedPages`. A sequence's result has the same bits whatever the others are: its
queries are a block of their own, and its keys are read in blocks at fixed positions. Keys before a window are read too,
and hidden.
"""

from __future__ import annotations

import jax.numpy as jnp

from gptjax.kernels import target
from gptjax.kernels.attention import sharding
from gptjax.kernels.attention.spec import HEAD_SIZE, Mask, Options, PairedPages, side_by_side
from gptjax.types import Array

BLOCK = 512
"""Number of keys per block; the kernel computes with one while it reads the next."""


def unsupported_pages(size: int, dtype: str, shards: int, biased: bool) -> str | None:
    """Reason pages cannot be `PairedPages` (completes "it ..."), or None.

    size, dtype  of the heads of keys and values
    shards       number of shards of the heads
    biased       scores have a bias or sinks
    """
    if target.backend() != "tpu":
        return f"needs a TPU, got {target.backend()}"
    if biased:
        return "has no bias and no sinks"
    if dtype != "bfloat16":
        return f"needs keys and values in bfloat16, got {dtype}"
    if shards > 1:
        return "needs heads that are not sharded"
    if size > HEAD_SIZE:
        return f"needs heads of at most {HEAD_SIZE}, got {size}"
    return None


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if mask.pages is None or not isinstance(k, PairedPages):
        return "needs keys and values side by side in pages"
    if not mask.causal or mask.prefix is not None or mask.key_segments is not None:
        return "needs a causal mask without prefix and segments of keys"
    if options.bias is not None or options.sinks is not None or options.dropout:
        return "has no bias, no sinks and no dropout"
    if sharding.head_axes(q):
        return "needs heads that are not sharded"
    return None


def attention(q: Array, k: PairedPages, v: PairedPages, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`; k and v are the same pages. Of a row of padding alone only the first
    block is read, and the result is undefined."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    assert mask.pages is not None
    (B, T, N, H), K, (_, page, heads, _) = q.shape, k.heads, k.pairs.shape
    scale = options.scale_of(q)
    together, groups = side_by_side(K, H), N // K
    lengths = jnp.broadcast_to(jnp.asarray(mask.start) + T, (B,))
    if mask.query_segments is not None:
        lengths = jnp.where((mask.query_segments > 0).any(1), lengths, T)
    # A query is where its key head is among those side by side, with zeros for the others.
    own = jnp.eye(together, dtype=bool)[:, None, :, None]
    q = jnp.where(own, q.reshape(B * T, K // together, together, groups, 1, H), 0)
    q = q.reshape(B * T, K // together, together * groups, together * H)
    padding = (0, 0), (0, heads // 2 - K // together), (0, 0), (0, HEAD_SIZE - together * H)
    q = jnp.pad(q, padding).reshape(B * T, -1, HEAD_SIZE)

    def kernel(q: Array, pairs: Array, pages: Array, lengths: Array) -> Array:
        return ragged_paged_attention(
            *(q, pairs, lengths, pages, T * jnp.arange(B + 1, dtype=jnp.int32), jnp.full(1, B, jnp.int32)),
            sm_scale=scale,
            sliding_window=mask.window,
            soft_cap=options.softcap,
            num_kv_pages_per_block=min(max(BLOCK // page, 1), pages.shape[1]),
            num_queries_per_block=T,
        )

    y = sharding.on_each_device(kernel, ("...", "....", "..", "."), q, k.pairs, mask.pages, lengths)
    y = y.reshape(B * T, heads // 2, together * groups, HEAD_SIZE)[:, : K // together, :, : together * H]
    y = y.reshape(B * T, K // together, together, groups, together, H)
    return jnp.where(own, y, 0).sum(4).reshape(B, T, N, H)
