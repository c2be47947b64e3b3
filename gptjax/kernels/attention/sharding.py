"""Where a kernel runs: the share of the heads, and of the rows, that each device takes.

XLA can split a plain program over a mesh, but not a kernel: a kernel runs on each device's share, in `jax.shard_map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh

from gptjax.types import Array


def with_heads_of(q: Array, *others: Array) -> tuple[Array, ...]:
    """Keys or values [B, S, K, H], placed with their heads as those of q [B, T, N, H] are.

    A mesh may cut query heads into more parts than there are key heads, or into parts that K is no multiple of; keys
    are whole on every device then. Each head is repeated as often as it takes for every device to have those that its
    queries read.
    """
    axes = _spec(q)[2]
    if axes is None:
        return others

    def placed(x: Array) -> Array:
        batch, length, heads, size = _spec(x)
        if heads is not None:
            return x
        times = math.lcm(x.shape[2], num_shards(q, 2)) // x.shape[2]
        return jnp.repeat(x, times, axis=2, out_sharding=PartitionSpec(batch, length, axes, size))

    return tuple(map(placed, others))


def unsupported_reason(q: Array, k: Array, v: Array) -> str | None:
    """Why a kernel cannot run on each device's share of q [B, T, N, H], k and v [B, S, K, H]; None: it can."""
    mesh = get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        return "needs a mesh with explicit axes"
    (batch, length, heads, size), *others = (_spec(x) for x in (q, k, v))
    if any(spec[1] or spec[3] for spec in others) or length or size:
        return "needs whole sequences and heads on each device"
    if any((spec[0], spec[2]) != (batch, heads) for spec in others):
        return "needs queries, keys and values sharded alike"
    return None


def cuts_rows(q: Array, k: Array, v: Array) -> bool:
    """Whether a mesh cuts the rows of q [B, T, N, H], k and v [B, S, K, H] into parts, all three alike."""
    (_, length, _, size), *others = (_spec(x) for x in (q, k, v))
    whole_heads = not size and all(spec[3] is None for spec in others)
    return bool(row_axes(q)) and whole_heads and all(spec[1] == length for spec in others)


def row_axes(q: Array) -> tuple[str, ...]:
    """The mesh axes that cut the rows of q [B, T, N, H]."""
    return _names(_spec(q)[1])


def num_shards(x: Array, axis: int) -> int:
    """How many parts a mesh cuts this axis of x into."""
    sizes = get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _names(_spec(x)[axis]))


def on_each_device(kernel: Callable[..., Array], axes: tuple[Any, ...], *arrays: Any) -> Array:
    """kernel(*arrays), on each device's rows and heads.

    axes  the axes of each array by their letters, "BTNH" for queries first, "BSKH" for keys next, "." for one that is
          whole; the result's are the queries'. Or the specs of a tree of arrays
    """
    mesh = get_abstract_mesh()
    if not mesh.explicit_axes:
        return kernel(*arrays)
    queries, keys = _spec(arrays[0]), _spec(arrays[1])
    place = {"B": queries[0], "T": queries[1], "N": queries[2], "S": keys[1], "K": keys[2]}
    specs = tuple(PartitionSpec(*map(place.get, of)) if isinstance(of, str) else of for of in axes)

    def placed(x: Any, spec: Any) -> Any:
        return None if x is None else jax.tree.map(jax.sharding.reshard, x, spec)

    # Kernels do not say over which axes their results vary, so that cannot be checked.
    return jax.shard_map(
        kernel, in_specs=specs, out_specs=specs[0], axis_names=set(mesh.explicit_axes), check_vma=False
    )(*map(placed, arrays, specs))


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec gives: none, one or several."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _spec(x: Any) -> tuple[Any, ...]:
    return tuple(jax.typeof(x).sharding.spec)
