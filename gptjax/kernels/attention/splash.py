"""Splash attention: jax's Pallas kernel for TPUs, which skips blocks that the mask hides and never writes scores out.

The mask becomes part of the program, so it must be known when that is made. Where there is no TPU the kernel is
interpreted: slow, and right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.kernels import target
from gptjax.kernels.attention import place
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array

BLOCKS = 512, 256, 128
"""Queries or keys in a block: the largest that divides the length."""


def refuses(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Why splash cannot do this; None: it can."""
    T, S = q.shape[1], k.shape[1]
    if T % BLOCKS[-1] or S % BLOCKS[-1]:
        return f"needs lengths that are multiples of {BLOCKS[-1]}, got {T} queries and {S} keys"
    if mask.offset is not None or mask.prefix is not None:
        return "needs a mask that is known when the program is made: no offset, no prefix"
    if mask.window is not None and T != S:
        return f"needs as many queries as keys for a window, got {T} and {S}"
    if options.bias is not None or options.dropout:
        return "has no bias and no dropout"
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        return f"needs q, k and v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    return place.refuses(q, k, v)


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    scale = options.scale_of(q)

    def kernel(q, k, v, query_segments, key_segments, sinks):
        row = _kernel(mask, options.softcap, q.shape[1], k.shape[1], heads=q.shape[2])
        segments = None if query_segments is None else 0
        # The kernel does not scale. In float32, as the scale itself would be rounded to q's dtype first.
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        rows = jax.vmap(row, in_axes=(0, 0, 0, segments, segments, None))
        return rows(q, k, v, query_segments, key_segments, sinks).swapaxes(1, 2)

    axes = "BTNH", "BSKH", "BSKH", "BT", "BS", "N"
    sinks = None if options.sinks is None else options.sinks.astype(jnp.float32)
    return place.on_each_device(kernel, axes, q, k, v, mask.query_segments, mask.key_segments, sinks)


def _kernel(mask: Mask, softcap: float | None, queries: int, keys: int, heads: int) -> Callable[..., Any]:
    """Attention of one row: q [N, T, H], k [K, S, H], v [K, S, Hv], segments [T] and [S], sinks [N] -> [N, T, Hv]."""
    # Imported when it is needed, as it takes a while.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = queries, keys
    if mask.window is not None:
        reach = mask.window - 1
        pattern = masks.LocalMask(shape, (reach, 0 if mask.causal else reach), offset=0)
    else:
        pattern = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    bq, bk = (next(size for size in BLOCKS if length % size == 0) for length in shape)
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([pattern] * heads),
        block_sizes=splash.BlockSizes(bq, bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=target.platform() != "tpu",
    )

    def row(q, k, v, query_segments, key_segments, sinks):
        segments = None if query_segments is None else splash.SegmentIds(query_segments, key_segments)
        return attend(q, k, v, segments, sinks)

    return row
