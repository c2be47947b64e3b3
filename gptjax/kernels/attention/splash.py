"""Splash attention: jax's Pallas kernel for TPUs, which skips blocks that the mask hides and never writes scores out.

The mask becomes part of the program, so it must be known when that is made. Where there is no TPU the kernel is
interpreted: slow, and right.

Where a mesh cuts the rows, a device gathers all keys and values and answers its share of the queries, as `gathered`
does; under a causal mask a share of equal work, as `zigzag` deals them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, get_abstract_mesh

from gptjax.kernels import target
from gptjax.kernels.attention import sharding, zigzag
from gptjax.kernels.attention.spec import SAVED, Mask, Options
from gptjax.types import Array

BLOCKS = 512, 256, 128
"""Queries or keys in a block: the largest that divides the length."""


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Why splash cannot do this; None: it can."""
    if not sharding.cuts_rows(q, k, v) and (reason := sharding.unsupported_reason(q, k, v)):
        return reason
    T, S = q.shape[1] // sharding.num_shards(q, 1), k.shape[1]
    if T % BLOCKS[-1] or S % BLOCKS[-1]:
        return f"needs lengths on a device that are multiples of {BLOCKS[-1]}, got {T} queries and {S} keys"
    if mask.offset is not None or mask.prefix is not None:
        return "needs a mask that is known when the program is made: no offset, no prefix"
    if mask.window is not None and q.shape[1] != S:
        return f"needs as many queries as keys for a window, got {q.shape[1]} and {S}"
    if options.bias is not None or options.dropout:
        return "has no bias and no dropout"
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        return f"needs q, k and v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    scale, cut = options.scale_of(q), sharding.row_axes(q)
    deals = bool(cut) and mask.causal and mask.window is None
    row, specs = _kernel(q, k, mask, options.softcap, deals)

    def kernel(q, k, v, row, query_segments, key_segments, sinks):
        if cut:
            gather = functools.partial(lax.all_gather, axis_name=cut, axis=1, tiled=True)
            k, v, key_segments = jax.tree.map(gather, (k, v, key_segments))
        if deals:
            q, query_segments = jax.tree.map(lambda x: zigzag.zigzag_split(x, cut), (q, query_segments))
        # The kernel does not scale. In float32, as the scale itself would be rounded to q's dtype first.
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        segments = None if query_segments is None else _segments(query_segments, key_segments)
        y = jax.vmap(row, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks).swapaxes(1, 2)
        return zigzag.zigzag_merge(y, cut) if deals else y

    axes = "BTNH", "BSKH", "BSKH", specs, "BT", "BS", "N"
    sinks = None if options.sinks is None else options.sinks.astype(jnp.float32)
    return sharding.on_each_device(kernel, axes, q, k, v, row, mask.query_segments, mask.key_segments, sinks)


def _segments(queries: Array, keys: Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(queries, keys)


@functools.cache
def _reordered_causal_mask() -> type:
    """A causal mask of shape [T, S] whose queries are at the given positions, int32 [T]. Its class, made once: masks
    that are equal are processed once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    class ReorderedCausalMask(masks.CausalMask):
        def __init__(self, shape: tuple[int, int], positions: np.ndarray) -> None:
            super().__init__(shape)
            self.q_sequence = positions  # what the mask function gets in place of 0, 1, 2, ...

    return ReorderedCausalMask


def _kernel(q: Array, k: Array, mask: Mask, softcap: float | None, deals: bool) -> tuple[Any, Any]:
    """Attention of one row, with a device's share of the heads and queries:

        (q [N, T, H], k [K, S, H], v [K, S, Hv], segments, sinks [N]) -> [N, T, Hv]

    It holds arrays that say what each block of queries sees; beside it comes how they are placed.
    """
    # Imported when it is needed, as it takes a while.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, parts = (q.shape[1], k.shape[1]), sharding.num_shards(q, 1)
    block = q.shape[1] // parts
    if mask.window is not None:
        reach = mask.window - 1
        pattern = masks.LocalMask(shape, (reach, 0 if mask.causal else reach), offset=0)
    elif mask.causal:
        pattern = masks.CausalMask(shape)
        if deals:
            block //= 2  # so that blocks are of one piece, where they can be
            pieces = np.arange(shape[0], dtype=np.int32).reshape(-1, block)
            pattern = _reordered_causal_mask()(shape, pieces[zigzag.zigzag_order(parts)].reshape(-1))
    else:
        parts, pattern = 1, masks.FullMask((block, shape[1]))  # which is the same on all devices
    bq, bk = (next((size for size in BLOCKS if length % size == 0), BLOCKS[-1]) for length in (block, shape[1]))
    row = splash.make_splash_mha(
        masks.MultiHeadMask([pattern] * (q.shape[2] // sharding.num_shards(q, 2))),
        block_sizes=splash.BlockSizes(bq, bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=SAVED,
        interpret=target.backend() != "tpu",
    )
    spec = PartitionSpec(None, sharding.row_axes(q) if parts > 1 else None)
    mesh = get_abstract_mesh()
    sizes = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # it can't read that an axis is manual, as stages are
    return row, row.manual_sharding_spec(NamedSharding(sizes, spec))
