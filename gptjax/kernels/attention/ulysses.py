"""Context parallelism by all-to-all: sharded sequences become whole ones with sharded heads, which any kernel computes,
and the results go back (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Each of n devices sends (n - 1) / n of its queries, keys, values and results once, and in the backward pass of their
gradients; where n does not divide the number of key heads, these are repeated first. Devices hold as much as before:
1 / n of the heads of whole sequences. With many heads this is less traffic than `ring`, which sends all keys and values
n - 1 times, and its kernels are the fast ones of a single device; the number of heads limits n.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.kernels.attention import dispatch, sharding
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if not sharding.shards_sequence(q, k, v):
        return "needs sequences sharded into equal parts, queries and keys alike"
    if q.shape[2] % (shards := _shards(q)):
        return f"needs a number of query heads that is a multiple of {shards}, the shards, got {q.shape[2]}"
    if mask.offset is not None:
        return "needs queries and keys at the same positions"
    return None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    sharded = jax.typeof(q).sharding.spec
    batch, heads = sharded[0], sharding.head_axes(q) + sharding.sequence_axes(q)
    times = math.lcm(k.shape[2], _shards(q)) // k.shape[2]
    if times > 1:
        k, v = (jnp.repeat(x, times, axis=2, out_sharding=jax.typeof(x).sharding) for x in (k, v))
    q, k, v = (jax.reshard(x, PartitionSpec(batch, None, heads, None)) for x in (q, k, v))
    rows = {name: getattr(mask, name) for name in ("query_segments", "key_segments", "prefix")}
    whole = {name: None if x is None else jax.reshard(x, PartitionSpec(batch, None)) for name, x in rows.items()}
    bias, sinks = options.bias, options.sinks
    if bias is not None:
        bias = jax.reshard(bias, PartitionSpec(*(batch,) * (bias.ndim - 3), heads, None, None))
    if sinks is not None:
        sinks = jax.reshard(sinks, PartitionSpec(heads))
    rest = {name: getattr(options, name) for name in ("scale", "softcap", "dropout", "key")}
    y = dispatch.attention(q, k, v, dataclasses.replace(mask, **whole), bias=bias, sinks=sinks, **rest)
    return jax.reshard(y, sharded)


def _shards(q: Array) -> int:
    """Number of shards of q [B, T, N, H], along its sequences and heads."""
    return sharding.num_shards(q, 1) * sharding.num_shards(q, 2)
