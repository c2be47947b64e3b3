"""Splash attention: jax's Pallas kernel for TPUs, which skips blocks that the mask hides and never writes scores out.

The mask becomes part of the program, so it must be known when that is made. Where there is no TPU the kernel is
interpreted: slow, and right.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

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
    if not isinstance(mask.offset, int) or mask.offset != 0 or mask.prefix is not None:
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
    interpret, scale = place.platform() != "tpu", options.scale_of(q)

    def kernel(q, k, v, query_segments, key_segments, sinks):
        queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
        attend = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([_pattern(mask, queries, keys)] * heads),
            block_sizes=_blocks(queries, keys),
            attn_logits_soft_cap=options.softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        segments = None
        if query_segments is not None:
            segments = splash_attention_kernel.SegmentIds(query_segments, key_segments)
        # The kernel does not scale. In float32, as the scale itself would be rounded to q's dtype first.
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        rows = jax.vmap(attend, in_axes=(0, 0, 0, None if segments is None else 0, None))
        y: Any = rows(*(x.swapaxes(1, 2) for x in (q, k, v)), segments, sinks)
        return y.swapaxes(1, 2)

    axes = "BTNH", "BSKH", "BSKH", "BT", "BS", "N"
    sinks = None if options.sinks is None else options.sinks.astype(jnp.float32)
    return place.on_each_device(kernel, axes, q, k, v, mask.query_segments, mask.key_segments, sinks)


def _pattern(mask: Mask, queries: int, keys: int) -> splash_attention_mask.Mask:
    shape, reach = (queries, keys), None if mask.window is None else mask.window - 1
    if reach is not None:
        return splash_attention_mask.LocalMask(shape, (reach, 0 if mask.causal else reach), offset=0)
    return splash_attention_mask.CausalMask(shape) if mask.causal else splash_attention_mask.FullMask(shape)


def _blocks(queries: int, keys: int) -> splash_attention_kernel.BlockSizes:
    q, kv = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    return splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
    )
