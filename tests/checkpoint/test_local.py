"""Local checkpoints: whole or unused, restored from whichever host has a copy, with every bit."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_replicas import MESHES, abstract, bits, state
from two_processes import run_on_two

from gptjax.checkpoint import placement, shard_file
from gptjax.checkpoint.local import LocalCheckpoints
from gptjax.checkpoint.shard_file import Shard, ShardFile, write
from gptjax.distributed.sharding import MeshConfig
from gptjax.types import UserError


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*-*") if path.is_file())


def saved(mesh: jax.sharding.Mesh) -> dict:
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), state(), abstract(mesh))


def equal(found: dict, expected: dict) -> bool:
    same = map(lambda x, y: bits(x) == bits(y), *map(jax.tree.leaves, (found, expected)))
    return all(same) and jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, expected)


@pytest.mark.parametrize("config", [*MESHES, MeshConfig(data=1, fsdp=8)], ids=str)
def test_every_bit_comes_back_on_any_mesh(config, tmp_path):
    mesh = config.make()
    with jax.set_mesh(mesh), LocalCheckpoints(tmp_path, "run", 1) as local:
        local.save(3, saved(mesh), {"input": {"row": 7}}, 1.5)
    other = MeshConfig(data=1, fsdp=2, tensor=4).make()
    for place in (mesh, other):
        with jax.set_mesh(place), LocalCheckpoints(tmp_path, "run", 1) as local:
            found = local.restore(abstract(place), 2)
            assert found is not None
            assert (found.step, found.extra, found.loss) == (3, {"input": {"row": 7}}, 1.5)
            assert equal(found.state, saved(place))
            assert local.restore(abstract(place), 3) is None
            assert "none is newer" in local.found


def test_the_last_complete_one_is_kept_beside_the_next(tmp_path):
    mesh = MeshConfig(data=8).make()
    with jax.set_mesh(mesh), LocalCheckpoints(tmp_path, "run", 1) as local:
        for step in (1, 2, 3):
            local.save(step, saved(mesh), {})
        local._thread.shutdown()
        assert [path.name.partition("-")[0] for path in files(tmp_path)] == ["2", "3"]
        local.clear()
    assert files(tmp_path) == []


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "header":
        content[20] ^= 1
    elif how == "bit":
        content[ShardFile.open(path).begins[0]] ^= 1
    path.write_bytes(content[:-1] if how == "truncated" else b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["header", "bit", "truncated", "empty", "killed"])
def test_one_that_is_not_whole_is_named_and_not_used(how, tmp_path, caplog):
    """The one before it is; if there is none, the words say what is missing."""
    mesh = MeshConfig(data=1, fsdp=8).make()
    with jax.set_mesh(mesh):
        with LocalCheckpoints(tmp_path, "run", 1) as local:
            local.save(1, saved(mesh), {})
            local.save(2, saved(mesh), {})
        first, second = files(tmp_path)
        damaged(second, how) if how != "killed" else second.rename(second.with_name(f"{second.name}.partial"))
        with LocalCheckpoints(tmp_path, "run", 1) as local:
            found = local.restore(abstract(mesh), -1)
            assert found is not None
            assert found.step == 1
            assert equal(found.state, saved(mesh))
            first.unlink()
            assert local.restore(abstract(mesh), 0) is None
            assert ("bytes of step 2 are on no host" in local.found) == (how == "bit"), local.found
    assert ("damaged" in caplog.text) == (how != "killed")


def test_another_runs_files_are_not_used(tmp_path):
    mesh = MeshConfig(data=8).make()
    with jax.set_mesh(mesh):
        with LocalCheckpoints(tmp_path, "run", 1) as local:
            local.save(1, saved(mesh), {})
        with LocalCheckpoints(tmp_path, "other", 1) as local:
            (there,) = files(tmp_path)
            (local.folder / there.name).write_bytes(there.read_bytes())
            assert local.restore(abstract(mesh), -1) is None


def test_a_full_disk_costs_one_checkpoint(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mesh = MeshConfig(data=8).make()
    with jax.set_mesh(mesh), LocalCheckpoints(tmp_path, "run", 1) as local:
        local.save(1, saved(mesh), {})
        local.save(2, saved(mesh), {})
        local.wait()
        with monkeypatch.context() as patch:
            patch.setattr(shard_file, "write", full)
            local.save(3, saved(mesh), {})
            local.wait()
        local.save(4, saved(mesh), {})
    assert "step 3 could not be written" in caplog.text
    assert "No space left" in caplog.text
    assert [path.name.partition("-")[0] for path in files(tmp_path)] == ["2", "4"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^local_checkpoints: cannot write to {tmp_path}/file on .*choose another"):
        LocalCheckpoints(tmp_path / "file", "run", 1)


def test_a_file_has_every_shard(tmp_path):
    arrays = [
        np.arange(3).astype(jnp.bfloat16),
        np.int32(-7),
        np.zeros((0,), np.float32),
        np.arange(6.0).reshape(2, 3).T,
    ]
    shards = [
        Shard("a", "bfloat16", (5,), ((0, 3),)),
        Shard("b", "int32", (), ()),
        Shard("c", "float32", (0,), ((0, 0),)),
        Shard("d", "float64", (3, 2), ((0, 3), (0, 2))),
    ]
    write(tmp_path / "file", {"step": 1}, shards, arrays)
    file = ShardFile.open(tmp_path / "file")
    assert (file.shards, file.description) == (shards, {"step": 1})
    for number, (shard, array) in enumerate(zip(shards, arrays, strict=True)):
        assert file.is_sound(number)
        np.testing.assert_array_equal(shard.view(file.read(number)), array)


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """The next step, whose state replaces the last one, changes nothing in what is saved."""
    begin, original = threading.Event(), shard_file.write
    monkeypatch.setattr(shard_file, "write", lambda *args: begin.wait() and original(*args))
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with LocalCheckpoints(tmp_path, "run", 1) as local:
        values = step(jnp.zeros(1000))
        local.save(1, {"values": values}, {})
        values = step(step(values)).block_until_ready()
        begin.set()
    with LocalCheckpoints(tmp_path, "run", 1) as local:
        found = local.restore({"values": jax.ShapeDtypeStruct((1000,), jnp.float32)}, -1)
    assert found is not None
    np.testing.assert_array_equal(found.state["values"], np.ones(1000))


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    id: int


class Grid:
    """Sharding of [8] over devices in this order, with so many replicas."""

    def __init__(self, owners: list[int], replicas: int):
        self.devices = [Device(owner, number) for number, owner in enumerate(owners)]
        self.parts = len(owners) // replicas

    def devices_indices_map(self, shape):
        size = shape[0] // self.parts
        return {d: (slice(i % self.parts * size, (i % self.parts + 1) * size),) for i, d in enumerate(self.devices)}


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize(
    ("owners", "hosts"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3]),
        ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 2, 2]),
        ([3, 3, 2, 2, 1, 1, 0, 0], [0, 1, 0, 1]),
        ([0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2]),
    ],
)
def test_every_shard_is_on_two_hosts_and_once_on_each(owners, hosts, replicas, monkeypatch):
    """So any one host may be lost. What is held there already is not sent."""
    sharding, found = Grid(owners, replicas), {}
    held = placement.bounds_by_device(sharding, (8,))
    for process in range(len(hosts)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        placed = placement.place(sharding, (8,), hosts)
        for bounds, device in [*placed.own.items(), *placed.sent.items()]:
            assert device.process_index == process
            found.setdefault(bounds, []).append(hosts[process])
        assert all(held[device] == bounds for bounds, device in placed.own.items())
        assert all(held[placed.sources[device]] == bounds for bounds, device in placed.sent.items())
        own = {bounds: {hosts[device.process_index] for device in held if held[device] == bounds} for bounds in found}
        assert bool(placed.sources) == any(len(where) < 2 for where in own.values())
    assert found.keys() == set(held.values())
    for where in found.values():
        assert len(where) == len(set(where)) >= 2


JOB = """
import shutil, sys
from pathlib import Path
import jax
number, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
from test_local import damaged, equal, files
from test_replicas import abstract, state
from gptjax.checkpoint.local import LocalCheckpoints
from gptjax.distributed import processes
from gptjax.distributed.sharding import MeshConfig

def saved(mesh):
    return jax.jit(state, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract(mesh)))()

def restored(name, mesh, at=("0", "1"), newer_than=-1):
    processes.barrier("the folders are as they are")
    with LocalCheckpoints(folder / at[number], name, 1) as local:
        found = local.restore(abstract(mesh), newer_than)
    return found, local.found

def lose(host):
    processes.barrier("nobody reads")
    if number == host:
        shutil.rmtree(folder / str(host))

for name, config in {"fsdp": MeshConfig(data=1, fsdp=4), "both": MeshConfig(data=2, fsdp=2)}.items():
    mesh = config.make()
    smaller = MeshConfig(data=2, tensor=2).make()
    with jax.set_mesh(mesh):
        expected = saved(mesh)
        for lost in (None, 0, 1):
            with LocalCheckpoints(folder / str(number), name, 1) as local:
                local.save(1, expected, {"row": 1})
                local.save(2, expected, {"row": 2}, 0.5)
            if lost is not None:
                lose(lost)
            found, words = restored(name, mesh)
            assert (found.step, found.extra, found.loss) == (2, {"row": 2}, 0.5)
            assert equal(found.state, expected)
            assert ("from other hosts" in words) == (lost is not None), words
        with LocalCheckpoints(folder / str(number), name, 1) as local:
            local.save(2, expected, {})
        found, words = restored(name, mesh, at=("1", "0"))  # other numbers after a restart
        assert equal(found.state, expected)
        for host in (0, 1):  # one copy of a shard is damaged, then the other too
            if number == host:
                for path in files(folder / str(host)):
                    damaged(path, "bit")
            found, words = restored(name, mesh)
            assert (found is None) == bool(host)
            assert found is None or equal(found.state, expected)
        assert "bytes of step 2 are on no host" in words, words
        with LocalCheckpoints(folder / str(number), name, 1) as local:
            local.save(3, expected, {})
        if number == 1:
            for path in files(folder / "1"):
                path.unlink()
        if name == "both":
            found, words = restored(name, mesh)
            assert found.step == 3
        lose(0)
        found, words = restored(name, mesh, newer_than=2)
        assert found is None and "none is newer" in words, words
    with jax.set_mesh(mesh), LocalCheckpoints(folder / str(number), name, 1) as local:
        local.save(4, expected, {})
    with jax.set_mesh(smaller):
        found, words = restored(name, smaller)
        assert equal(found.state, saved(smaller))
print("done")
"""


@pytest.mark.slow
def test_a_host_may_be_lost(tmp_path):
    """Two hosts of two devices each; parameters sharded over both, or a copy on each."""
    run_on_two(JOB, tmp_path)
