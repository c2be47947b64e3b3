"""Splash attention: jax's Pallas kernel for TPUs, which skips hidden blocks and does not materialise scores.

The mask is part of the program, so it must be known at trace time. Without a TPU the kernel is interpreted: slow but
correct.

With sharded sequences, keys and values are all-gathered and a device computes its shard of the queries, as in
`gathered`; under a causal mask, shards of equal work in `zigzag` order.
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
"""Block sizes in queries or keys; the largest that divides the length is used."""


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason splash cannot handle the inputs (completes "it ..."), or None."""
    if not sharding.shards_sequence(q, k, v) and (reason := sharding.unsupported_reason(q, k, v)):
        return reason
    T, S = q.shape[1] // sharding.num_shards(q, 1), k.shape[1]
    if T % BLOCKS[-1] or S % BLOCKS[-1]:
        return f"needs lengths per device that are multiples of {BLOCKS[-1]}, got {T} queries and {S} keys"
    if mask.offset is not None or mask.prefix is not None:
        return "needs a mask that is known at trace time: no offset, no prefix"
    if mask.window is not None and q.shape[1] != S:
        return f"needs as many queries as keys for a window, got {q.shape[1]} and {S}"
    if options.bias is not None or options.dropout:
        return "has no bias and no dropout"
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        return f"needs q, k and v all bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    scale, mesh_axes = options.scale_of(q), sharding.sequence_axes(q)
    balanced = bool(mesh_axes) and mask.causal and mask.window is None
    row, specs = _kernel(q, k, mask, options.softcap, balanced)

    def kernel(q, k, v, row, query_segments, key_segments, sinks):
        if mesh_axes:
            gather = functools.partial(lax.all_gather, axis_name=mesh_axes, axis=1, tiled=True)
            k, v, key_segments = jax.tree.map(gather, (k, v, key_segments))
        if balanced:
            q, query_segments = jax.tree.map(lambda x: zigzag.zigzag_split(x, mesh_axes), (q, query_segments))
        # The kernel does not scale. Scale in float32, else the scale would be rounded to q's dtype first.
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        segments = None if query_segments is None else _segments(query_segments, key_segments)
        y = jax.vmap(row, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks).swapaxes(1, 2)
        return zigzag.zigzag_merge(y, mesh_axes) if balanced else y

    axes = "BTNH", "BSKH", "BSKH", specs, "BT", "BS", "N"
    sinks = None if options.sinks is None else options.sinks.astype(jnp.float32)
    return sharding.on_each_device(kernel, axes, q, k, v, row, mask.query_segments, mask.key_segments, sinks)


def _segments(queries: Array, keys: Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(queries, keys)


@functools.cache
def _reordered_causal_mask() -> type:
    """Class of causal masks [T, S] with queries at given positions, int32 [T]. The class is created once, so that equal
    masks are processed once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    class ReorderedCausalMask(masks.CausalMask):
        def __init__(self, shape: tuple[int, int], positions: np.ndarray) -> None:
            super().__init__(shape)
            self.q_sequence = positions  # the mask function's argument instead of 0, 1, 2, ...

    return ReorderedCausalMask


def _kernel(q: Array, k: Array, mask: Mask, softcap: float | None, balanced: bool) -> tuple[Any, Any]:
    """The kernel for one sequence, with a device's shard of the heads and queries, and the specs of its arrays:

        (q [N, T, H], k [K, S, H], v [K, S, Hv], segments, sinks [N]) -> [N, T, Hv]

    The kernel's arrays list the visible blocks of keys of each block of queries. balanced: queries in `zigzag` order.
    """
    # Imported here because it takes a while.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, parts = (q.shape[1], k.shape[1]), sharding.num_shards(q, 1)
    block = q.shape[1] // parts
    if mask.window is not None:
        reach = mask.window - 1
        pattern = masks.LocalMask(shape, (reach, 0 if mask.causal else reach), offset=0)
    elif mask.causal:
        pattern = masks.CausalMask(shape)
        if balanced:
            block //= 2  # so that a block lies within one piece if possible
            pieces = np.arange(shape[0], dtype=np.int32).reshape(-1, block)
            pattern = _reordered_causal_mask()(shape, pieces[zigzag.zigzag_order(parts)].reshape(-1))
    else:
        parts, pattern = 1, masks.FullMask((block, shape[1]))  # the same on all devices
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
    spec = PartitionSpec(None, sharding.sequence_axes(q) if parts > 1 else None)
    mesh = get_abstract_mesh()
    sizes = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names
    )  # splash rejects a mesh with manual axes, such as pipeline stages
    return row, row.manual_sharding_spec(NamedSharding(sizes, spec))
