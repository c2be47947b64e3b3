"""Sharding of attention kernels over sequences and heads.

XLA can partition a plain program over a mesh but not a kernel, so a kernel runs on each device's shard in
`jax.shard_map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh

from gptjax.types import Array, PyTree


def with_heads_of(q: Array, *others: Array) -> tuple[Array, ...]:
    """Shard the heads of keys or values [B, S, K, H] like those of q [B, T, N, H].

    If the number of shards of the query heads does not divide K, keys are replicated. Then each key head is repeated
    until every device's shard has the heads that its queries read.
    """
    axes = _spec(q)[2]
    if axes is None:
        return others

    def shard(x: Array) -> Array:
        batch, length, heads, size = _spec(x)
        if heads is not None:
            return x
        times = math.lcm(x.shape[2], num_shards(q, 2)) // x.shape[2]
        return jnp.repeat(x, times, axis=2, out_sharding=PartitionSpec(batch, length, axes, size))

    return tuple(map(shard, others))


def unsupported_reason(q: Array, k: Array, v: Array) -> str | None:
    """Reason a kernel cannot run on each device's shard of q [B, T, N, H], k and v [B, S, K, H] (completes "it ..."),
    or None."""
    mesh = get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        return "needs a mesh with explicit axes"
    (batch, length, heads, size), *others = (_spec(x) for x in (q, k, v))
    if any(spec[1] or spec[3] for spec in others) or length or size:
        return "needs whole sequences and heads on each device"
    if any((spec[0], spec[2]) != (batch, heads) for spec in others):
        return "needs queries, keys and values sharded alike"
    return None


def shards_sequence(q: Array, k: Array, v: Array) -> bool:
    """True if the sequences of q [B, T, N, H], k and v [B, S, K, H] are sharded over the mesh, all three alike."""
    (_, length, _, size), *others = (_spec(x) for x in (q, k, v))
    whole_heads = not size and all(spec[3] is None for spec in others)
    return bool(sequence_axes(q)) and whole_heads and all(spec[1] == length for spec in others)


def sequence_axes(q: Array) -> tuple[str, ...]:
    """The mesh axes over which the sequences of q [B, T, N, H] are sharded."""
    return _names(_spec(q)[1])


def head_axes(x: Array) -> tuple[str, ...]:
    """The mesh axes over which the heads of x [B, S, K, H] are sharded."""
    return _names(_spec(x)[2])


def num_shards(x: Array, axis: int) -> int:
    """Number of shards of this axis of x."""
    sizes = get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _names(_spec(x)[axis]))


def on_each_device(kernel: Callable[..., Array], axes: tuple[Any, ...], *arrays: PyTree) -> Array:
    """Run kernel(*arrays) on each device's shard of the sequences and heads.

    axes  letters of each array's axes, or specs of a tree of arrays: "BTNH" for the first array, the queries, "BSKH"
          for the second, the keys; "." for an axis that is not sharded. The result has the axes of the queries
    """
    mesh = get_abstract_mesh()
    if not mesh.explicit_axes:
        return kernel(*arrays)
    queries, keys = _spec(arrays[0]), _spec(arrays[1])
    by_letter = {"B": queries[0], "T": queries[1], "N": queries[2], "S": keys[1], "K": keys[2]}
    specs = tuple(PartitionSpec(*map(by_letter.get, of)) if isinstance(of, str) else of for of in axes)

    def reshard(x: PyTree, spec: PyTree) -> PyTree:
        return None if x is None else jax.tree.map(jax.sharding.reshard, x, spec)

    # No check_vma: kernels do not declare over which mesh axes their results vary.
    return jax.shard_map(
        kernel, in_specs=specs, out_specs=specs[0], axis_names=set(mesh.explicit_axes), check_vma=False
    )(*map(reshard, arrays, specs))


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes of a spec's entry, as a tuple."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _spec(x: Any) -> tuple[Any, ...]:
    return tuple(jax.typeof(jax.tree.leaves(x)[0]).sharding.spec)  # a cache entry's arrays have the same axes
