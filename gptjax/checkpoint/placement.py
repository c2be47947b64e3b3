"""Placement of a state's shards on hosts, so that each is on two: the processes that hold a shard keep it, and a shard
that one host alone holds is sent to the next host."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint.shard_file import Bounds

DEVICE = "device"


def bounds_by_device(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> dict[Any, Bounds]:
    """Device -> bounds of its shard of an array, for all devices of all processes."""
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in sharding.devices_indices_map(tuple(shape)).items()
    }


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shards of an array that this process keeps."""

    own: dict[Bounds, Any]
    """Bounds -> device of this process that holds the shard."""
    sent: dict[Bounds, Any]
    """Bounds -> device of this process that gets the shard from another host's."""
    sources: dict[Any, Any]
    """Device -> device whose shard is sent to it, for all devices. {}: every shard is on two hosts already."""


def place(sharding: jax.sharding.Sharding, shape: Sequence[int], hosts: Sequence[int]) -> Placement:
    """Placement of an array. Of several processes of a host that hold or get the same shard, the first keeps it.

    hosts  host of each process"""
    held, holders = bounds_by_device(sharding, shape), defaultdict(set)
    for device, bounds in held.items():
        holders[bounds].add(hosts[device.process_index])
    own = _first_on_host(held, hosts)
    sources, sent = {}, {}
    if len(set(hosts)) > 1 and any(len(found) < 2 for found in holders.values()):
        sources = neighbours(list(held), hosts)
        received = {to: held[source] for to, source in sources.items()}
        new = {to: bounds for to, bounds in received.items() if hosts[to.process_index] not in holders[bounds]}
        sent = _first_on_host(new, hosts)
    return Placement(own, sent, sources)


def _first_on_host(bounds: dict[Any, Bounds], hosts: Sequence[int]) -> dict[Bounds, Any]:
    """Those of a host's shards that this process keeps."""
    first = {}
    for device in sorted(bounds, key=lambda device: (device.process_index, device.id)):
        first.setdefault((hosts[device.process_index], bounds[device]), device)
    here = jax.process_index()
    return {found: device for (_, found), device in first.items() if device.process_index == here}


def neighbours(devices: Sequence[Any], hosts: Sequence[int]) -> dict[Any, Any]:
    """Device -> the device at the same position of the host before its own; of another host, unless one host has more
    than half of the devices."""
    ordered = sorted(devices, key=lambda device: (hosts[device.process_index], device.process_index, device.id))
    counts = np.bincount([hosts[device.process_index] for device in ordered])
    shift = int(counts.max())
    return {device: ordered[number - shift] for number, device in enumerate(ordered)}


def send(array: jax.Array, sources: dict[Any, Any]) -> dict[Any, jax.Array]:
    """Device of this process -> the shard of its source, bit for bit. A collective call.

    sources  as in `Placement`, in the same order on every process"""
    rows, *rest = array.sharding.shard_shape(array.shape)  # a scalar is on every device
    mesh = Mesh(np.array(list(sources)), (DEVICE,))
    sharding = NamedSharding(mesh, PartitionSpec(DEVICE))
    parts = [shard.data for shard in array.addressable_shards]
    number = {device: i for i, device in enumerate(sources)}
    pairs = tuple((number[source], number[device]) for device, source in sources.items())
    with jax.set_mesh(mesh):
        joined = jax.make_array_from_single_device_arrays((len(sources) * rows, *rest), sharding, parts)
        sent = _permuted(mesh, pairs)(joined)
    return {shard.device: shard.data for shard in sent.addressable_shards}


@functools.cache
def _permuted(mesh: Mesh, pairs: tuple[tuple[int, int], ...]) -> Any:
    """Program: the shards of an array, each on another device. It is compiled once per shape."""
    spec = PartitionSpec(DEVICE)
    permute = functools.partial(jax.lax.ppermute, axis_name=DEVICE, perm=pairs)
    return jax.jit(jax.shard_map(permute, mesh=mesh, in_specs=spec, out_specs=spec))
