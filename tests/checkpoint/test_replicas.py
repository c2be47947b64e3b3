"""A state that several processes hold copies of is read once, and arrives with every bit."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from two_processes import run_on_two

from gptjax.checkpoint import checkpoint, replicas
from gptjax.distributed.sharding import MeshConfig

SPECS = {"matrix": ("fsdp", "tensor"), "bias": (None,), "half": (None, "fsdp")}
MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(data=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
]


def state() -> dict:
    key = jax.random.key(0)
    return {
        "params": {
            "matrix": jax.random.normal(key, (1024, 512)),
            "bias": jnp.array([-0.0, 0.0, jnp.nan, -jnp.inf, 1e-40]),
            "half": jax.random.normal(key, (64, 8)).astype(jnp.bfloat16),
        },
        "flags": jnp.arange(5) % 2 == 0,
        "step": jnp.int32(-7),
        "key": jax.random.key(3, impl="rbg"),
    }


def abstract(mesh: jax.sharding.Mesh) -> dict:
    def placed(path, leaf):
        spec = SPECS.get(path[-1].key, ())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(state))


def bits(x: jax.Array) -> list[bytes]:
    """The bytes of each device."""
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(shard.data).tobytes() for shard in data.addressable_shards]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_bit_arrives_on_every_device(mesh):
    mesh = mesh.make()
    wanted = abstract(mesh)
    loaded = []

    def load(tree):
        loaded.extend(jax.tree.leaves(tree))
        return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), state(), tree)

    with jax.set_mesh(mesh):
        found = replicas.restore(load, wanted, wanted, "data")
        expected = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), state(), wanted)
        for x, y, leaf in zip(*map(jax.tree.leaves, (found, expected, wanted)), strict=True):
            assert bits(x) == bits(y)
            assert (x.shape, x.dtype, x.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
    first = set(np.take(mesh.devices, 0, mesh.axis_names.index("data")).flat)
    assert all(leaf.sharding.device_set == first for leaf in loaded)


@pytest.mark.parametrize(
    ("owners", "free", "axis"),
    [
        ([[0, 0], [1, 1]], [0, 1], 0),
        ([[0, 1], [0, 1]], [0, 1], 1),
        ([[0, 1], [2, 3]], [0], 0),
        ([[0, 1], [2, 3]], [1], 1),
        ([[0, 1], [0, 1]], [0], None),
        ([[0, 1], [2, 3]], [], None),
        ([[0, 0], [0, 0]], [0, 1], None),
    ],
)
def test_the_fewest_processes_read(owners, free, axis):
    """None: every process must."""
    assert replicas._fewest_readers(np.array(owners), free) == axis


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_one_process_reads_for_itself(mesh):
    assert replicas.replica_axis(abstract(mesh.make())) is None


def test_the_copies_in_an_abstract_state_are_found():
    """`jax.eval_shape` under a mesh gives arrays without a sharding, and others on an abstract mesh."""
    mesh = MeshConfig(data=2, fsdp=4).make()
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: (jnp.zeros(()), jax.reshard(jnp.zeros((8, 8)), PartitionSpec("fsdp"))))
        found = [checkpoint.placed(leaf).sharding for leaf in state]
    assert found == [NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp", None))]


JOB = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from test_replicas import abstract, bits, state
from gptjax.checkpoint import checkpoint
from gptjax.distributed.sharding import MeshConfig

def characters():
    return int(Path("/proc/self/io").read_text().split()[1])

load, read = checkpoint.Checkpoints._load, []

def counting(*args):
    before = characters()
    state = load(*args)
    read.append(characters() - before)
    return state

checkpoint.Checkpoints._load = counting
for number, config in enumerate((MeshConfig(data=2, fsdp=2), MeshConfig(data=1, fsdp=4), MeshConfig(data=4))):
    mesh = config.make()
    with jax.set_mesh(mesh):
        wanted = abstract(mesh)
        saved = jax.jit(state, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))()
        with checkpoint.Checkpoints(f"{sys.argv[3]}/{number}") as checkpoints:
            checkpoints.save(1, saved, {}, 1.0)
            found = checkpoints.restore(wanted).state
            params = checkpoints.restore_params(abstract_params=wanted["params"]).state
            checkpoints.save(2, found, {}, 1.0)  # the processes still count saves and restores alike
        assert list(map(bits, jax.tree.leaves(params))) == list(map(bits, jax.tree.leaves(saved["params"])))
        assert list(map(bits, jax.tree.leaves(found))) == list(map(bits, jax.tree.leaves(saved)))
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, wanted)
    print("read", read[-2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
def test_bytes_are_read_once_by_two_processes(tmp_path):
    """One of two copies is read. Each process reads its half of a state without copies."""
    first, second = ([int(count) for count in re.findall(r"read (\d+)", out)] for out in run_on_two(JOB, tmp_path))
    for number in (0, 2):
        size = sum(x.stat().st_size for x in (tmp_path / str(number) / "1").rglob("*") if x.parent.name == "d")
        assert size > 2**20
        assert 0.9 * size < first[number] < 1.2 * size
        assert second[number] < 0.2 * size
    assert first[1] + second[1] < 2 * first[0]
    assert min(first[1], second[1]) > 0.3 * first[0]
