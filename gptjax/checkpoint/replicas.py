"""Restoring a state of which several processes hold copies: one copy is read, and sent to the other processes.

Each position of a mesh axis that shards no array, such as `data`, holds a copy of the whole state, for instance a slice
of several. The processes at its first position read; the others get the bits from them, through the devices' links.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gptjax.distributed.sharding import axes_of
from gptjax.types import PyTree


def replica_axis(abstract: PyTree) -> str | None:
    """Mesh axis that shards no array of the tree, with the fewest processes at its first position. None: there is none,
    or each position has devices of every process."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(abstract)]
    meshes = {cast(Mesh, sharding.mesh) if isinstance(sharding, NamedSharding) else None for sharding in shardings}
    if len(meshes) > 1 or (mesh := meshes.pop()) is None:
        return None
    used = {axis for sharding in shardings for entry in sharding.spec for axis in axes_of(entry)}
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    free = [number for number, axis in enumerate(mesh.axis_names) if axis not in used]
    found = _fewest_readers(owners, free)
    return None if found is None else mesh.axis_names[found]


def _fewest_readers(owners: np.ndarray, free: Sequence[int]) -> int | None:
    """The one of these axes of an array of process numbers with the fewest different ones at its first position. None:
    all have all."""
    readers = {axis: np.unique(np.take(owners, 0, axis)).size for axis in free}
    best = min(free, key=readers.__getitem__, default=None)
    return best if best is not None and readers[best] < np.unique(owners).size else None


def restore(load: Callable[[PyTree], PyTree], abstract: PyTree, saved: PyTree, axis: str) -> PyTree:
    """The arrays of a checkpoint, read by the processes at the first position of a mesh axis. A collective call.

    load   abstract tree, or a part of it in nested dicts -> arrays; a collective call
    saved  the saved tree, of which the other processes load the smallest array alone
    axis   `replica_axis` of the abstract tree"""
    leaves, tree = jax.tree.flatten(abstract)
    mesh = leaves[0].sharding.mesh
    first = _first(mesh, axis)
    if any(device.process_index == jax.process_index() for device in first.devices.flat):
        shardings = [NamedSharding(first, leaf.sharding.spec) for leaf in leaves]
        wanted = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, shardings, strict=True)]
        arrays = jax.tree.leaves(load(tree.unflatten(wanted)))
    else:
        load(_smallest(saved))
        arrays = [None] * len(leaves)
    sent = []
    for leaf in leaves:
        sent.append(_send(arrays.pop(0), leaf, axis))  # nothing else holds the array that is read
    return tree.unflatten(sent)


def _smallest(saved: PyTree) -> PyTree:
    """The smallest array of a tree, in its nested dicts, to be put on a device of this process."""
    leaves = jax.tree_util.tree_leaves_with_path(saved)
    dicts = [(path, leaf) for path, leaf in leaves if all(isinstance(key, jax.tree_util.DictKey) for key in path)]
    path, leaf = min(dicts, key=lambda entry: math.prod(entry[1].shape))
    here = SingleDeviceSharding(jax.local_devices()[0])
    found: PyTree = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    for key in reversed(path):
        found = {key.key: found}
    return found


def _first(mesh: Mesh, axis: str) -> Mesh:
    """The mesh of the devices at the first position of an axis."""
    devices = np.take(mesh.devices, [0], axis=mesh.axis_names.index(axis))
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _send(array: jax.Array | None, leaf: jax.ShapeDtypeStruct, axis: str) -> jax.Array:
    """An array on its whole mesh, from that at the first position of an axis; None: it is not on this process."""
    abstract, restored = numbers(leaf)
    return restored(_send_bits(None if array is None else key_data(array), abstract, axis))


def numbers(leaf: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, Callable[[jax.Array], jax.Array]]:
    """The abstract array of the numbers that an array is stored as, which are those of typed keys or its own; and the
    array of such numbers."""
    if not _has_keys(leaf):
        return leaf, lambda array: array
    implementation: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        implementation.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    bits = jax.eval_shape(data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    abstract = jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=leaf.sharding)
    return abstract, lambda array: jax.random.wrap_key_data(array, impl=implementation[0])


def key_data(array: jax.Array) -> jax.Array:
    """The numbers of an array, or of typed keys."""
    return jax.random.key_data(array) if _has_keys(array) else array


def _has_keys(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _send_bits(array: jax.Array | None, leaf: jax.ShapeDtypeStruct, axis: str) -> jax.Array:
    """`_send` for numbers. The devices at other positions begin with zeros, and all are added as integers, so that
    every bit arrives: in floating point, -0 plus 0 is 0."""
    target, integer = leaf.sharding, np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    shape = (target.mesh.shape[axis], *leaf.shape)
    source = NamedSharding(target.mesh, PartitionSpec(axis, *target.spec))
    held = {} if array is None else {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
    zeros = np.zeros(target.shard_shape(leaf.shape), leaf.dtype)
    parts = [
        jax.device_put(held.get(device, zeros).view(integer)[None], device)
        for device in source.addressable_devices_indices_map(shape)
    ]
    return _summed(leaf.dtype, target)(jax.make_array_from_single_device_arrays(shape, source, parts))


@functools.cache
def _summed(dtype: np.dtype, target: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Program: the sum over the first axis, of integers, as bits of another type. It is compiled once per shape."""
    return jax.jit(lambda x: x.sum(0, dtype=x.dtype).view(dtype), out_shardings=target)
