"""Checkpoints: what comes back is what went in, to the bit, or it is refused and the one before is used."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bucket
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.checkpoint import manifest
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.types import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array
    ema: dict | None = None


def make_state(seed: int = 0, average: bool = False) -> State:
    params = {
        "embedding": jax.random.normal(jax.random.key(seed), (16, 8)),
        "blocks": {"q": jax.random.normal(jax.random.key(seed + 1), (2, 8, 2, 4)).astype(jnp.bfloat16)},
        "odd": jnp.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], jnp.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ema = jax.tree.map(lambda x: x * 2, params) if average else None
    return State(jnp.int32(seed), params, optimizer.init(params), jax.random.key(seed + 2), ema)


def bits(tree) -> list:
    data = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(data)]


def abstract(state):
    return jax.eval_shape(lambda: state)


@pytest.fixture
def two(tmp_path) -> Checkpoints:
    """Checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"position": step})
    return Checkpoints(tmp_path / "checkpoints")


def data_files(folder) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("average", [False, True])
def test_what_comes_back_is_what_went_in(tmp_path, average):
    state = make_state(7, average)
    extra = {"position": {"files": [1, 2], "offset": 3}, "config": {"name": "ü", "rate": 0.1, "none": None}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, extra, loss=1.5)
    restored = Checkpoints(tmp_path).restore(abstract(state))
    assert (restored.step, restored.extra) == (7, extra)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)


def test_state_can_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"params": {"w": jnp.arange(500_000.0)}, "key": jax.random.key(1)}
    extra = {"position": [0]}
    before = bits(state)
    step = jax.jit(lambda s: {"params": {"w": s["params"]["w"] * 0 - 1}, "key": s["key"]}, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, extra)
        extra["position"].append(1)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(state)
    assert bits(restored.state) == before
    assert restored.extra == {"position": [0]}


def test_restores_onto_any_mesh(tmp_path):
    def placed(devices, shape, spec):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3, devices=devices)
        return mesh, {"params": {"w": NamedSharding(mesh, spec)}, "step": NamedSharding(mesh, P())}

    state = {"params": {"w": jax.random.normal(jax.random.key(0), (16, 8))}, "step": jnp.int32(3)}
    devices = jax.devices()
    previous = jax.device_put(state, placed(devices, (8, 1, 1), P("data"))[1])
    for i, (count, shape, spec) in enumerate(
        [(1, (1, 1, 1), P()), (8, (2, 2, 2), P("fsdp", "tensor")), (4, (1, 4, 1), P(None, "fsdp"))]
    ):
        mesh, shardings = placed(devices[:count], shape, spec)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            checkpoints.save(0, previous, {})
            previous = checkpoints.restore(target).state
            assert bits(previous) == bits(state)
            assert jax.tree.map(lambda x: x.sharding, previous) == shardings
            with jax.set_mesh(mesh):  # shardings as eval_shape knows them: on an abstract mesh, or none for the scalar
                shapes = jax.eval_shape(lambda x: x, previous)
                again = checkpoints.restore(shapes).state
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), again, shardings))
            assert bits(again) == bits(state)


def test_one_flipped_bit_anywhere_is_found(two):
    random = np.random.default_rng(0)
    for path in data_files(two.folder / "2"):
        whole = path.read_bytes()
        places = {0, len(whole) // 2, len(whole) - 1, *random.integers(max(len(whole), 1), size=3).tolist()}
        for place in places if whole else ():
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(random.integers(7))
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=f"step 2: damaged .*{path.name}"):
                two.restore_params(step=2)
        path.write_bytes(whole)
    assert two.restore(abstract(make_state())).step == 2


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_process_reads_what_it_wrote(two, processes, monkeypatch):
    """As far as folders' names say it. Nobody looks into the folder of another."""
    folder, read = two.folder / "2", []
    for process in range(1, processes):
        shutil.copytree(folder / "state" / "ocdbt.process_0", folder / "state" / f"ocdbt.process_{process}")
    whole, files = manifest.digests(folder), manifest._files
    monkeypatch.setattr(
        manifest, "_files", lambda path, *more, **those: read.append(str(path)) or files(path, *more, **those)
    )
    shares = [manifest.digests(folder, process, processes) for process in range(processes)]
    assert sum(map(len, shares)) == len(whole)
    assert {name: found for share in shares for name, found in share.items()} == whole
    assert all(f"ocdbt.process_{i}/" in name for i, share in enumerate(shares[1:], 1) for name in share)
    assert len(read) == len(set(read)), "a folder was listed twice"


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_share_the_verification(two, processes):
    folder = two.folder / "2"
    whole = manifest.digests(folder)
    largest = max(whole, key=lambda name: whole[name][0])
    Path(folder / largest).write_bytes(b"!" * whole[largest][0])
    faults = [manifest.fault(folder, process, processes) for process in range(processes)]
    assert sum(fault is not None for fault in faults) == 1


@pytest.mark.parametrize("harm", ["cut short", "deleted", "no manifest", "half a manifest", "empty folder"])
def test_falls_back_to_the_one_before_and_says_so(two, harm, caplog):
    folder = Path(two.folder / "2")
    largest = max(data_files(folder / "state"), key=lambda path: path.stat().st_size)
    if harm == "cut short":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif harm == "deleted":
        largest.unlink()
    elif harm == "no manifest":
        (folder / manifest.NAME).unlink()
    elif harm == "half a manifest":
        (folder / manifest.NAME).write_text((folder / manifest.NAME).read_text()[:100])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with caplog.at_level(logging.WARNING):
        restored = two.restore(abstract(make_state()))
    assert (restored.step, restored.extra) == (1, {"position": 1})
    assert bits(restored.state) == bits(make_state(1))
    assert str(folder) in caplog.text
    assert ("unfinished" if harm in ("no manifest", "empty folder") else "damaged") in caplog.text

    two.save(2, make_state(5), {})  # the run goes on and meets the damaged step again
    assert bits(two.restore(abstract(make_state())).state) == bits(make_state(5))
    assert two.steps() == [1, 2]


def test_nothing_sound_is_a_user_error(two, tmp_path):
    for step in ("1", "2"):
        (Path(two.folder) / step / manifest.NAME).write_text("{}")
    with pytest.raises(UserError, match=r"step 2: damaged .*step 1: damaged"):
        two.restore(abstract(make_state()))
    with pytest.raises(UserError, match="there is none"):
        Checkpoints(tmp_path / "empty").restore(abstract(make_state()))
    with pytest.raises(UserError, match="step 9: missing"):
        two.restore(abstract(make_state()), step=9)
    assert Checkpoints(tmp_path / "empty").latest_step() is None
    assert not (tmp_path / "empty").exists()


def test_a_run_killed_before_its_first_checkpoint_was_finished_starts_again(two):
    for step in ("1", "2"):
        (Path(two.folder) / step / manifest.NAME).unlink()
    assert two.steps() == []
    two.save(2, make_state(4), {})
    assert bits(two.restore(abstract(make_state())).state) == bits(make_state(4))
    assert [path.name for path in Path(two.folder).iterdir()] == ["2"]


def test_another_configuration_is_not_taken_for_damage(two):
    state = make_state()
    wider = dataclasses.replace(state, params={**state.params, "embedding": jnp.zeros((16, 9))})
    more = dataclasses.replace(state, params={**state.params, "head": jnp.zeros((8, 16))})
    fewer = dataclasses.replace(state, params={"embedding": state.params["embedding"]})
    for other, fault in (
        (wider, r"params/embedding is \(16, 8\) there and \(16, 9\) here"),
        (more, r"params/head is absent there and \(8, 16\) here"),
        (fewer, r"params/blocks/q is \(2, 8, 2, 4\) there and absent here"),
        (make_state(average=True), "ema/blocks/q is absent there"),
    ):
        with pytest.raises(UserError, match=f"checkpoints/2: does not fit this configuration: {fault}"):
            two.restore(abstract(other))
    two.save(3, make_state(3, average=True), {})
    with pytest.raises(UserError, match=r"ema/blocks/q is \(2, 8, 2, 4\) there and absent here"):
        two.restore(abstract(state))


def test_keeps_the_newest_and_the_best(tmp_path):
    state = {"params": {"w": jnp.ones(3)}}
    losses = [3.0, 1.0, 2.0, float("nan"), None, 1.5]
    with Checkpoints(tmp_path, max_to_keep=2, best=1) as checkpoints:
        for step, loss in enumerate(losses):
            checkpoints.save(step, state, {}, loss)
        assert checkpoints.steps() == [1, 4, 5]
        assert checkpoints.latest_step() == 5
        with pytest.raises(ValueError, match="step 5 already has a checkpoint"):
            checkpoints.save(5, state, {})
    with Checkpoints(tmp_path, max_to_keep=1, best=2) as checkpoints:  # the losses are remembered across runs
        checkpoints.save(6, state, {}, 9.0)
        assert checkpoints.steps() == [1, 5, 6]
        checkpoints.restore(state, step=1)
        assert checkpoints.steps() == [1, 5, 6]
        checkpoints.save(2, state, {}, 0.5)  # going on from step 1, what came after it is a past that never was
        assert checkpoints.steps() == [1, 2]
    with pytest.raises(UserError, match="max_to_keep=0"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_params_alone(tmp_path):
    state = make_state(3, average=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"stage": "chat"})
        checkpoints.save(4, make_state(4), {})
        plain = checkpoints.restore_params(3)
        assert (plain.step, plain.extra) == (3, {"stage": "chat"})
        assert bits(plain.state) == bits(state.params)
        assert bits(checkpoints.restore_params(3, ema=True).state) == bits(state.ema)
        assert bits(checkpoints.restore_params(4, ema=True).state) == bits(make_state(4).params)
        given = checkpoints.restore_params(3, abstract_params=abstract(state.params))
        assert jax.tree.structure(given.state) == jax.tree.structure(state.params)
        assert bits(given.state) == bits(state.params)


def test_a_bucket_is_a_folder_too(monkeypatch):
    bucket.register()
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    with bucket.serving() as address, Checkpoints("gs://bucket/run/checkpoints", max_to_keep=2, best=0) as checkpoints:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"position": step})
        assert checkpoints.steps() == [2, 3]
        restored = checkpoints.restore(abstract(make_state()))
        assert (restored.step, restored.extra) == (3, {"position": 3})
        assert bits(restored.state) == bits(make_state(3))
        name = max(manifest.digests(checkpoints.folder / "3").items(), key=lambda file: file[1])[0]
        path = checkpoints.folder / "3" / name
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        restored = checkpoints.restore(abstract(make_state()))
        assert bits(restored.state) == bits(make_state(2))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match=r"could not write step 1 to .*file/checkpoints"):
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})


CRASHES = """
import json, os, resource, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from gptjax.checkpoint import checkpoint
from gptjax.checkpoint import manifest
from gptjax.types import UserError

heavy = [name for name in sys.modules if name.startswith(("orbax", "tensorstore"))]
folder = Path(sys.argv[1])
noise = lambda n: {"params": {"w": jnp.asarray(np.random.default_rng(0).standard_normal(n, np.float32))}}
checkpoints = checkpoint.Checkpoints(folder, max_to_keep=1, best=0)
checkpoints.save(1, noise(50_000), {})
checkpoints.wait()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as good as a full disk
failures = []
for step in (2, 3):
    checkpoints.save(step, noise(50_000), {})
    try:
        checkpoints.latest_step()
    except UserError as error:
        failures.append(str(error))
left = sorted(os.listdir(folder))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(json.dumps({"heavy": heavy, "failures": failures, "left": left}), flush=True)
if sys.argv[2] == "writing":
    checkpoints.save(4, noise(30_000_000), {})
    while not any("tmp" in name for name in os.listdir(folder)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(4, noise(50_000), {})
checkpoints.wait()
"""


@pytest.mark.parametrize("moment", ["writing", "committed"])
def test_full_disk_and_kill_leave_the_last_good_one(tmp_path, moment):
    folder = tmp_path / "checkpoints"
    run = subprocess.run(
        [sys.executable, "-c", CRASHES, folder, moment], capture_output=True, text=True, env={**os.environ}, timeout=120
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    said = json.loads(run.stdout)
    assert said["heavy"] == []  # importing the module is light
    assert said["left"] == ["1"]
    for step, failure in zip((2, 3), said["failures"], strict=True):
        assert f"could not write step {step} to {folder}" in failure
        assert failure.endswith("the last good checkpoint is step 1")
        assert "\n" not in failure
    assert "Traceback" not in run.stderr

    left = {path.name for path in folder.iterdir()}
    assert len(left) == 2
    with Checkpoints(folder) as checkpoints:
        state = {"params": {"w": jax.ShapeDtypeStruct((50_000,), jnp.float32)}}
        assert checkpoints.latest_step() == 1
        restored = checkpoints.restore(state)
        assert restored.step == 1
        assert {path.name for path in folder.iterdir()} == left  # reading changes nothing
        checkpoints.save(4, restored.state, {})
        checkpoints.wait()
        assert {path.name for path in folder.iterdir()} == {"1", "4"}
