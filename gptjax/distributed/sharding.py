"""Where arrays live: a mesh of devices with explicit axes, and the rules that place logical axes on it.

A module names its axes logically ("embed", "heads"); `ShardingRules` maps each to mesh axes. Data, FSDP, tensor,
context, expert and pipeline parallelism and their products are different `ShardingRules`, never different code:

    ShardingRules()                                               nothing is sharded; no mesh is needed
    ShardingRules(batch="data")                                   data parallel
    ShardingRules(batch=("data", "fsdp"), embed="fsdp")           and fully sharded parameters
    ShardingRules(batch=("data", "fsdp"), embed="fsdp", heads="tensor", kv_heads="tensor", ffn="tensor", vocab="tensor")

A rule holds where the current mesh has its axis, with more than one device along it, and says nothing elsewhere: so
`DEFAULT_RULES`, which knows every axis of `MeshConfig`, is right for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.types import UserError

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis, or several, or none. Calling it makes the PartitionSpec of an array."""

    batch: Axis = None
    """Rows of a batch."""
    sequence: Axis = None
    """Positions in a row."""
    embed: Axis = None
    """The width of the residual stream."""
    heads: Axis = None
    """Query heads."""
    kv_heads: Axis = None
    """Key/value heads; whole on every device where the mesh does not divide them, as a single one."""
    ffn: Axis = None
    """Hidden units of the MLP."""
    vocab: Axis = None
    """Token ids."""
    experts: Axis = None
    """Experts of a mixture."""
    layers: Axis = None
    """Stacked blocks."""

    def __call__(self, *axes: str | None) -> PartitionSpec | None:
        """The spec for an array with these logical axes; None where there is no mesh, so that modules run anywhere."""
        if jax.sharding.get_abstract_mesh().empty:
            return None
        return PartitionSpec(*(None if axis is None else self.mesh_axes(axis) or None for axis in axes))

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The axes of the current mesh that cut a logical axis into parts; within a `jax.shard_map`, of those that are
        left."""
        mesh = jax.sharding.get_abstract_mesh()
        names = (name for name in axes_of(getattr(self, axis)) if name not in mesh.manual_axes)
        return tuple(name for name in names if mesh.shape.get(name, 1) > 1)

    def axis_if_divisible(self, axis: str, size: int) -> str | None:
        """The logical axis, or None where the current mesh does not cut so many into equal parts."""
        mesh = jax.sharding.get_abstract_mesh()
        return axis if mesh.empty or size % self.num_shards(axis, dict(mesh.shape)) == 0 else None

    def for_batch_size(self, rows: int) -> ShardingRules:
        """The rules for so many whole rows: if the current mesh does not cut them into equal parts, all are on every
        device."""
        batch = self.batch if self.axis_if_divisible("batch", rows) else None
        return dataclasses.replace(self, batch=batch, sequence=None)

    def num_shards(self, axis: str, sizes: dict[str, int]) -> int:
        """How many parts a mesh of these sizes cuts a logical axis into."""
        return math.prod(sizes.get(name, 1) for name in axes_of(getattr(self, axis)))

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError for a rule whose axis is not one of a mesh with these."""
        for field in dataclasses.fields(self):
            for name in axes_of(getattr(self, field.name)):
                if name not in names:
                    raise UserError(f"rules.{field.name}: got {name!r}, must be an axis of mesh: {', '.join(names)}")


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
"""What each axis of `MeshConfig` is for: what an experiment uses unless it says otherwise."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. One axis may be -1: all devices that are left."""

    data: int = -1
    """Copies of the model, each on its share of the batch."""
    fsdp: int = 1
    """Shares of the batch that also share out the parameters."""
    pipeline: int = 1
    """Pipeline stages: parts of the stack of layers, each on the devices of its own; shares of the batch beside it."""
    expert: int = 1
    """Shares of the batch that also share out the experts of a mixture."""
    context: int = 1
    """Parts of every row, for sequences too long for one device."""
    tensor: int = 1
    """Parts of every layer: heads, hidden units, vocabulary."""

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis sizes on that many devices. Raises UserError when they don't fit."""
        sizes = dataclasses.asdict(self)
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"mesh: only one axis can be -1 (the rest of the devices), got {' and '.join(free)}")
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise UserError(f"mesh.{axis}: got {size}, must be positive, or -1 for the rest of the devices")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free and devices % fixed == 0:
            sizes[free[0]] = devices // fixed
        if math.prod(sizes.values()) != devices:
            shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"
            raise UserError(f"mesh: {shape} does not fit {devices} device(s); the product must be {devices}")
        return sizes

    def make(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The jax mesh, with explicit axes, over these devices (default: all there are).

        Of several TPU slices each holds whole copies of the model: within a slice chips have links of their own,
        between slices there is a network, over which gradients alone then go. Raises UserError where `data` cannot be
        so divided. The slices of GPUs are the hosts: they are taken one after the other, so that the last axes lie
        within a host as far as they fit.
        """
        devices = list(devices) if devices is not None else jax.devices()
        sizes = self.sizes(len(devices))
        names, types = tuple(sizes), (AxisType.Explicit,) * len(sizes)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        # An axis is one of the chips' own, or several, where it can be, as in `jax.make_mesh`; else a part of one.
        split = {"allow_split_physical_axes": True}
        if slices == 1:
            placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
            return jax.sharding.Mesh(placed, names, axis_types=types)
        if devices[0].platform == "gpu":
            devices.sort(key=lambda device: (device.slice_index, device.id))
            return jax.sharding.Mesh(np.reshape(devices, tuple(sizes.values())), names, axis_types=types)
        if sizes["data"] % slices:
            raise UserError(
                f"mesh.data: got {sizes['data']}, must be a multiple of {slices}, the slices, "
                "so that parameters are shared out within a slice"
            )
        within = (sizes["data"] // slices, *list(sizes.values())[1:])
        across = (slices, *(1,) * len(within[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
        return jax.sharding.Mesh(placed, names, axis_types=types)


def axes_of(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that a rule, or an entry of a PartitionSpec, gives: none, one or several."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def use(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """Context in which `mesh` is current; one device needs none, and its programs are simpler without."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def on_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """Context in which the mesh that the arrays of a tree lie on is current; if they lie on none, nothing changes."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(cast(jax.sharding.Mesh, mesh))


def reshard(x: Any, spec: PartitionSpec | None) -> Any:
    """x placed as `ShardingRules` say, inside of a program; without a mesh, where they say nothing, x."""
    return x if spec is None else jax.reshard(x, spec)


def split_microbatches(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]. A part takes every parts-th row, so that rows which a mesh cuts stay where
    they are."""
    return jax.numpy.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def data_shard(rules: ShardingRules) -> tuple[int, int]:
    """(rank, ranks): which of how many shares of a batch's rows the devices of this process hold, on the current mesh.

    Processes that hold the same rows, because they cut rows or layers between them, have the same rank."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return 0, 1
    place = NamedSharding(mesh, cast(PartitionSpec, rules("batch")))
    starts = place.devices_indices_map((mesh.size,)).items()
    return _data_shard([(device.process_index, rows.start or 0) for device, (rows,) in starts], jax.process_index())


def _data_shard(held: Sequence[tuple[int, int]], process: int) -> tuple[int, int]:
    """The rank and ranks of a process, where (process, row) lists who holds what. (0, 1), all rows, where two hold some
    of the same and some not, or not as many."""
    rows: dict[int, set[int]] = {}
    for one, row in held:
        rows.setdefault(one, set()).add(row)
    shares = sorted({tuple(sorted(some)) for some in rows.values()})
    apart = sum(map(len, shares)) == len({row for _, row in held}) == len(shares) * len(shares[0])
    return (shares.index(tuple(sorted(rows[process]))), len(shares)) if apart else (0, 1)


def global_array(local, rules: ShardingRules):
    """Global `jax.Array`s [B, ...], sharded by `rules.batch` and `rules.sequence`, from a tree of host arrays
    [B / ranks, ...], the `data_shard` of this process."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jax.numpy.asarray, local)
    _, ranks = data_shard(rules)

    def place(x):
        spec = cast(PartitionSpec, rules("batch", "sequence", *[None] * (x.ndim - 2)))
        shape = (ranks * x.shape[0], *x.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, shape)

    return jax.tree.map(place, local)
