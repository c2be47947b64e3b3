"""Meshes with explicit axes, and the sharding rules that map logical axes to mesh axes.

A module names its axes logically ("embed", "heads"); `ShardingRules` maps each to mesh axes. Data, FSDP, tensor,
context, expert and pipeline parallelism and their products are different `ShardingRules`, never different code:

    ShardingRules()                                               nothing is sharded; no mesh is needed
    ShardingRules(batch="data")                                   data parallel
    ShardingRules(batch=("data", "fsdp"), embed="fsdp")           and fully sharded parameters
    ShardingRules(batch=("data", "fsdp"), embed="fsdp", heads="tensor", kv_heads="tensor", ffn="tensor", vocab="tensor")

Rules for absent or size-1 mesh axes are ignored, so `DEFAULT_RULES`, which covers every axis of `MeshConfig`, fits
every mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from gptjax.distributed import processes
from gptjax.types import PyTree, UserError

Axis = str | tuple[str, ...] | None
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis, several mesh axes, or None. Calling it returns an array's PartitionSpec."""

    batch: Axis = None
    """Sequences of a batch."""
    sequence: Axis = None
    """Positions of a sequence."""
    embed: Axis = None
    """The width of the residual stream."""
    heads: Axis = None
    """Query heads."""
    kv_heads: Axis = None
    """Key/value heads; replicated if the mesh axes do not divide their number."""
    ffn: Axis = None
    """Hidden units of the MLP."""
    vocab: Axis = None
    """Token ids."""
    experts: Axis = None
    """Experts of a mixture."""
    layers: Axis = None
    """Stacked blocks."""

    def __call__(self, *axes: str | None) -> PartitionSpec | None:
        """The spec of an array with these logical axes. None: no mesh is current, so modules also run without one."""
        if jax.sharding.get_abstract_mesh().empty:
            return None
        return PartitionSpec(*(None if axis is None else self.mesh_axes(axis) or None for axis in axes))

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """Axes of the current mesh over which a logical axis is sharded. Within `jax.shard_map`, manual axes are left
        out."""
        mesh = jax.sharding.get_abstract_mesh()
        names = (name for name in axes_of(getattr(self, axis)) if name not in mesh.manual_axes)
        return tuple(name for name in names if mesh.shape.get(name, 1) > 1)

    def axis_if_divisible(self, axis: str, size: int) -> str | None:
        """`axis` if `size` is divisible by its mesh axes, else None."""
        mesh = jax.sharding.get_abstract_mesh()
        return axis if mesh.empty or size % self.num_shards(axis, dict(mesh.shape)) == 0 else None

    def for_batch_size(self, rows: int) -> ShardingRules:
        """The rules for a batch of `rows` unsplit sequences: replicated if the current mesh does not divide their
        number."""
        batch = self.batch if self.axis_if_divisible("batch", rows) else None
        return dataclasses.replace(self, batch=batch, sequence=None)

    def without(self, names: Sequence[str]) -> ShardingRules:
        """The rules without these mesh axes."""
        own = {field.name: axes_of(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return ShardingRules(**{axis: tuple(n for n in axes if n not in names) for axis, axes in own.items()})

    def num_shards(self, axis: str, sizes: dict[str, int]) -> int:
        """Number of shards of a logical axis on a mesh with these axis sizes."""
        return math.prod(sizes.get(name, 1) for name in axes_of(getattr(self, axis)))

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError if a rule uses a mesh axis that is not in `names`."""
        for field in dataclasses.fields(self):
            for name in axes_of(getattr(self, field.name)):
                if name not in names:
                    raise UserError(f"rules.{field.name}: got {name!r}, must be an axis of mesh: {', '.join(names)}")

    def check_sizes(self, axes: Iterable[tuple[str, str, int]], sizes: dict[str, int]) -> None:
        """Raise UserError, naming the field, for an axis that a mesh with these axis sizes cannot split evenly.

        axes  (logical axis, field, size), as `ModelConfig.axes`"""
        for axis, field, size in axes:
            if size % (parts := self.num_shards(axis, sizes)):
                over = ", ".join(f"mesh.{name}" for name in axes_of(getattr(self, axis)) if sizes.get(name, 1) > 1)
                raise UserError(
                    f"{field}: got {size}, must be a multiple of {parts}, its number of shards on the mesh; change it, "
                    f"{over} or rules.{axis}"
                )


DEFAULT_RULES = ShardingRules(
    batch=("data", "fsdp", "expert", "pipeline"),
    sequence="context",
    embed="fsdp",
    heads="tensor",
    kv_heads="tensor",
    ffn="tensor",
    vocab="tensor",
    experts="expert",
    layers="pipeline",
)
"""An experiment's default rules; they give every axis of `MeshConfig` its purpose."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Mesh shape: devices along each axis. One axis may be -1: all remaining devices."""

    data: int = -1
    """Data parallelism: replicas of the model; the batch is sharded over them."""
    fsdp: int = 1
    """Fully sharded data parallelism: batch and parameters are sharded over this axis."""
    pipeline: int = 1
    """Pipeline parallelism: stages of consecutive layers. Outside the stack of layers the batch is sharded over it."""
    expert: int = 1
    """Expert parallelism: the batch and the experts of a mixture are sharded over this axis."""
    context: int = 1
    """Context parallelism: sequences are sharded over this axis, for those too long for one device."""
    tensor: int = 1
    """Tensor parallelism: heads, hidden units and vocabulary are sharded over this axis."""

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis sizes on this number of devices. Raises UserError if they do not fit."""
        sizes = dataclasses.asdict(self)
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"mesh: only one axis can be -1 (all remaining devices), got {' and '.join(free)}")
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise UserError(f"mesh.{axis}: got {size}, must be positive, or -1 for all remaining devices")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free and devices % fixed == 0:
            sizes[free[0]] = devices // fixed
        if math.prod(sizes.values()) != devices:
            shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"
            raise UserError(f"mesh: {shape} does not fit {devices} device(s); the product must be {devices}")
        return sizes

    def make(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The `jax.sharding.Mesh`, with explicit axes, over these devices. None: all devices.

        With several TPU slices, `data` spans the slices and every slice holds whole replicas of the model: only
        gradients then cross the network between slices, everything else the links between chips. Raises UserError if
        the number of slices does not divide `data`. On GPUs a slice is a host; hosts are ordered one after the other,
        so that the last axes stay within a host as far as they fit.

        The pipeline's axis is named first, wherever its devices lie: jaxlib 0.11.2 aborts on a `jax.shard_map` over it
        that has another inside over an axis named before it.
        """
        devices = list(devices) if devices is not None else jax.devices()
        sizes = self.sizes(len(devices))

        def mesh(placed: np.ndarray) -> jax.sharding.Mesh:
            names = sorted(sizes, key=lambda name: name != "pipeline")
            placed = placed.transpose([list(sizes).index(name) for name in names])
            return jax.sharding.Mesh(placed, tuple(names), axis_types=(AxisType.Explicit,) * len(names))

        slices = len({getattr(device, "slice_index", 0) for device in devices})
        # A mesh axis takes one or several whole axes of the chips' torus if possible, as in `jax.make_mesh`, else a
        # part of one.
        split = {"allow_split_physical_axes": True}
        if slices == 1:
            return mesh(mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split))
        if devices[0].platform == "gpu":
            devices.sort(key=lambda device: (device.slice_index, device.id))
            return mesh(np.reshape(devices, tuple(sizes.values())))
        if sizes["data"] % slices:
            raise UserError(
                f"mesh.data: got {sizes['data']}, must be a multiple of {slices}, the number of slices, "
                "so that parameters are sharded within a slice"
            )
        within = (sizes["data"] // slices, *list(sizes.values())[1:])
        across = (slices, *(1,) * len(within[1:]))
        return mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices, **split))


def axes_of(axis: Axis) -> tuple[str, ...]:
    """The mesh axes of a rule or of a PartitionSpec entry, as a tuple."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def use(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """Context in which `mesh` is current. A mesh of one device is not set: programs are simpler without it."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def on_mesh_of(tree: PyTree) -> contextlib.AbstractContextManager:
    """Context in which the mesh of the tree's arrays is current. If they have no mesh, the context changes nothing."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(cast(jax.sharding.Mesh, mesh))


def reshard(x: PyTree, spec: PartitionSpec | None) -> PyTree:
    """`jax.reshard` to the spec of `ShardingRules`, inside a program. None (no mesh): x unchanged."""
    return x if spec is None else jax.reshard(x, spec)


def split_microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]. A microbatch takes every `count`-th sequence, so that a sharded batch is
    split without moving data between devices."""
    return jax.numpy.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def map_microbatches(function: Callable[[PyTree], PyTree], tree: PyTree, count: int) -> Any:
    """function(tree), arrays [B, ...], called on `count` microbatches one after the other to save memory."""
    if count == 1:
        return function(tree)
    found = jax.lax.map(function, jax.tree.map(lambda x: split_microbatches(jax.numpy.asarray(x), count), tree))
    return jax.tree.map(lambda x: jax.numpy.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def data_shard(rules: ShardingRules) -> tuple[int, int]:
    """Index and count of this process's slice of the global batch, on the current mesh.

    Processes that hold the same sequences, because a sequence or the layers are sharded over them, have the same
    index."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return 0, 1
    sharding = NamedSharding(mesh, cast(PartitionSpec, rules("batch")))
    rows_by_device = sharding.devices_indices_map((mesh.size,)).items()
    owners = [(device.process_index, rows.start or 0) for device, (rows,) in rows_by_device]
    return _data_shard(owners, jax.process_index())


def _data_shard(owners: Sequence[tuple[int, int]], process: int) -> tuple[int, int]:
    """`data_shard` of a process, from the (process, row) pairs of all devices. (0, 1), all rows, if the processes'
    sets of rows overlap partially or differ in size."""
    rows: dict[int, set[int]] = {}
    for owner, row in owners:
        rows.setdefault(owner, set()).add(row)
    shards = sorted({tuple(sorted(shard)) for shard in rows.values()})
    disjoint = sum(map(len, shards)) == len({row for _, row in owners}) == len(shards) * len(shards[0])
    return (shards.index(tuple(sorted(rows[process]))), len(shards)) if disjoint else (0, 1)


def global_array(local, rules: ShardingRules):
    """Build global `jax.Array`s [B, ...], sharded by `rules.batch` and `rules.sequence`, from a tree of host arrays
    [B / num_shards, ...], the `data_shard` of this process."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jax.numpy.asarray, local)
    _, num_shards = data_shard(rules)

    def globalise(x):
        shape = (num_shards * x.shape[0], *x.shape[1:])
        return jax.make_array_from_process_local_data(_batch_sharding(shape, rules, mesh), x, shape)

    return jax.tree.map(globalise, local)


def fetch(x: jax.Array) -> np.ndarray:
    """Fetch all of an array to the host, on every process."""
    return np.asarray(x) if x.is_fully_addressable else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def on_own_devices(tree: Tree) -> Tree:
    """A copy of a tree of global arrays on this process's devices, which it may use without the other processes. A
    collective call. In a job of one process: the tree.

    The devices have the axes of the arrays' mesh, along each as many as are this process's, and the same specs. Raises
    UserError if they are no such part of the mesh, or have no room."""
    if jax.process_count() == 1:
        return tree
    processes.on_each(lambda: check_room(tree, _own_sharding, jax.local_devices()[0].memory_stats() or {}))
    return jax.tree.map(_on_own_devices, tree)


def _on_own_devices(x: jax.Array) -> jax.Array:
    _, all_processes = _process_meshes(x)
    own = _own_sharding(x)
    with jax.set_mesh(all_processes):  # in which devices may have another order
        copies = jax.device_put(x, NamedSharding(all_processes, own.spec))
    shards = [shard.data for shard in copies.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, own, shards)


def check_room(tree: PyTree, sharding: Callable[[jax.Array], NamedSharding], memory: Mapping[str, int]) -> None:
    """Raise UserError if a device with these `memory_stats` has no room for its part of a copy of the tree."""
    free = memory.get("bytes_limit", sys.maxsize) - memory.get("bytes_in_use", 0)
    needed = sum(math.prod(sharding(x).shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    if needed > free:
        raise UserError(
            f"mesh: each process writes replies with a copy of all parameters on its own devices, which takes "
            f"{needed / 2**30:.1f} GiB of each, where {free / 2**30:.1f} are free; use hosts with more memory"
        )


def _own_sharding(x: jax.Array) -> NamedSharding:
    return NamedSharding(_process_meshes(x)[0], cast(NamedSharding, x.sharding).spec)


def _process_meshes(x: jax.Array) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    """This process's part of the array's mesh, and the parts of all processes, whose first axis is "process"."""
    return _parts_of(cast(jax.sharding.Mesh, cast(NamedSharding, x.sharding).mesh))


@functools.cache
def _parts_of(mesh: jax.sharding.Mesh) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    parts = [_part_of_process(mesh.devices, process) for process in range(jax.process_count())]
    if len({part.shape for part in parts}) > 1:
        raise UserError("mesh: got one whose processes hold different parts of its axes; rollouts need equal ones")
    types = {"axis_types": mesh.axis_types}
    own = jax.sharding.Mesh(parts[jax.process_index()], mesh.axis_names, **types)
    types = {"axis_types": (AxisType.Explicit, *mesh.axis_types)}
    return own, jax.sharding.Mesh(np.stack(parts), ("process", *mesh.axis_names), **types)


def _part_of_process(devices: np.ndarray, process: int) -> np.ndarray:
    """The devices of a process, along each axis those places that it has."""
    held = np.argwhere(np.vectorize(lambda device: device.process_index == process)(devices))
    part = devices[np.ix_(*(np.unique(places) for places in held.T))]
    if part.size != len(held):
        raise UserError("mesh: got one of whose axes a process holds no whole part; rollouts need one")
    return part


def abstract_array(batch: Tree, rules: ShardingRules, mesh: jax.sharding.Mesh | AbstractMesh) -> Tree:
    """Add the shardings that `global_array` would give to a tree of `jax.ShapeDtypeStruct`s [B, ...]. `mesh` is the
    current one."""

    def shard(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_batch_sharding(x.shape, rules, mesh))

    return jax.tree.map(shard, batch)


def _batch_sharding(
    shape: tuple[int, ...], rules: ShardingRules, mesh: jax.sharding.Mesh | AbstractMesh
) -> NamedSharding:
    """Sharding of an array [B] or [B, T, ...] of a batch. The second axis is not sharded where it is not divisible, as
    that of labels [B, 1]."""
    if len(shape) == 1:
        return NamedSharding(mesh, rules("batch") or PartitionSpec())
    sequence = rules.axis_if_divisible("sequence", shape[1])
    return NamedSharding(mesh, rules("batch", sequence, *[None] * (len(shape) - 2)) or PartitionSpec())
