"""Rollouts in jobs of several processes: replies are those of one process, and what one meets stops all."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from job import Job, losses

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed import sharding
from gptjax.distributed.sharding import MeshConfig
from gptjax.monitor import metrics
from gptjax.types import UserError

VOWELS = """
import dataclasses, math, os, sys
from pathlib import Path

from gptjax import data, objectives, optim, tasks
from gptjax.config import allow
from gptjax.data.chat import Message
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.nn import TransformerConfig
from gptjax.protocols import Reward
from gptjax.train.rollouts import Rollouts
from gptjax.train.stage import Stage
from gptjax.types import Unavailable

FAULT = Path("fault")


def fault():
    # What the second process meets, as the test says.
    return FAULT.read_text() if os.environ["JAX_PROCESS_ID"] == "1" and FAULT.exists() else ""


@dataclasses.dataclass(frozen=True)
class Vowels(tasks.Task):
    def __len__(self):
        return 12

    def example(self, i):
        return Message("user", "abc"[i % 3] * (1 + i)), Message("assistant", "aeiou")

    def score(self, i, reply):
        if fault() == "raises":
            raise ValueError("I cannot read this")
        share = sum(c in "aeiou" for c in reply.text) / max(len(reply.text), 1)
        return tasks.Score(share, value=math.inf if fault() == "is infinite" else share)

    @property
    def generation(self):
        return tasks.Generation(max_tokens=5)


@dataclasses.dataclass(frozen=True)
class Letters(Reward):
    # A judge that another process may not reach.
    def __call__(self, conversations):
        if fault() == "does not answer":
            raise Unavailable("url: got no answer")
        return [len(set(conversation[-1].text)) / 5 for conversation in conversations]

    def fingerprint(self):
        return ""


allow(sys.modules[__name__])
experiment = Experiment(
    model=TransformerConfig(vocab=40, layers=1, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={
        "rl": Stage(
            data=Rollouts(Vowels(), REWARD length=24, batch=12, group=4, rows=4, workers=1, validation=0.2),
            objective=objectives.OBJECTIVE,
            optimizer=optim.AdamW(learning_rate=1e-2),
            steps=STEPS,
            evaluate_every=4,
            save_every=4,
            log_every=1,
            prompts=(),
        )
    },
    mesh=MeshConfig(data=1, fsdp=-1),
)
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a process."""

    process_index: int


def test_a_process_has_a_part_of_each_axis():
    """Hosts of a slice of 4 x 4 chips have 2 x 2 each. An odd part is refused."""
    hosts = np.array([[Device(i // 2 * 2 + j // 2) for j in range(4)] for i in range(4)])
    for shape, part in (((4, 4), (2, 2)), ((1, 16), (1, 4)), ((2, 8), (1, 4)), ((2, 2, 4), (1, 2, 2))):
        for process in range(4):
            own = sharding._part_of_process(hosts.reshape(shape), process)
            assert own.shape == part
            assert {device.process_index for device in own.flat} == {process}
    with pytest.raises(UserError, match="mesh: got one of whose axes a process holds no whole part"):
        sharding._part_of_process(np.array([[Device(0), Device(1)], [Device(1), Device(0)]]), 0)


def test_parameters_without_room_are_refused():
    params = {"a": jax.ShapeDtypeStruct((2**20, 1024), np.float32)}
    own = NamedSharding(MeshConfig(data=1, fsdp=-1).make(), PartitionSpec("fsdp"))
    sharding.check_room(params, lambda _: own, {"bytes_limit": 2**30, "bytes_in_use": 2**29})
    with pytest.raises(UserError, match=r"takes 0.5 GiB of each, where 0.4 are free"):
        sharding.check_room(params, lambda _: own, {"bytes_limit": 2**30, "bytes_in_use": 2**29 + 2**27})


def program(folder: Path, objective: str = "GRPO(kl=0.0)", steps: int = 12, reward: str = "") -> Path:
    file = folder / "vowels.py"
    file.write_text(VOWELS.replace("OBJECTIVE", objective).replace("STEPS", str(steps)).replace("REWARD", reward))
    return file


def replies(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts" / "rl.jsonl").read_text().splitlines()]


def left(folder: Path) -> tuple[dict, dict]:
    """Bits of the last parameters, and position of the data."""
    with Checkpoints(folder / "checkpoints" / "rl") as checkpoints:
        restored = checkpoints.restore_params()
    position = restored.extra["input"]
    if position["ahead"] is not None:
        position["ahead"].pop("seconds")
    return {str(path): np.asarray(x).tobytes() for path, x in leaves(restored.state)}, position


def leaves(tree: dict, path: tuple = ()):
    for name, branch in tree.items():
        yield from leaves(branch, (*path, name)) if isinstance(branch, dict) else [((*path, name), branch)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        pytest.param("GRPO(kl=0.0)", (), id="one after the other"),
        pytest.param(
            "PPO(kl=0.0)",
            ("--rl.data.ahead", "1", "--rl.data.equal_groups", "drop", "--rl.data.refill", "1"),
            id="ahead, with a critic",
        ),
    ],
)
def test_two_processes_write_what_one_does_however_they_are_stopped(tmp_path, objective, options):
    """Three groups of four are shared by two; the parameters are sharded over both. They are stopped by SIGTERM to one
    of them, then killed, and go on to the same bits."""
    file = program(tmp_path, objective)
    for count, name in ((1, "one"), (2, "two")):
        with Job(file, count, f"runs/{name}", options) as job:
            ended = job.end()
            assert [code for code, _ in ended] == [0] * count, ended
    one, two, stopped = (tmp_path / "runs" / name for name in ("one", "two", "stopped"))
    assert len(replies(one)) >= 12 * 12
    assert replies(two) == replies(one)
    np.testing.assert_allclose(list(losses(two).values()), list(losses(one).values()), rtol=0, atol=1e-4)
    lines = metrics.read(two)
    assert len({(line["step"], *sorted(line)) for line in lines}) == len(lines), "nothing is recorded twice"
    if not options:  # else replies are those of the parameters of a step before
        assert max(line["mismatch_max"] for line in lines if "mismatch_max" in line) < 1e-4

    with Job(file, 2, "runs/stopped", options) as job:
        job.reach(stopped, 2)
        job.processes[1].send_signal(signal.SIGTERM)
        assert [code for code, _ in job.end()] == [130, 130]
    with Job(file, 2, "runs/stopped", options) as job:
        job.reach(stopped, max(losses(stopped)) + 2)
        for process in job.processes:
            process.kill()
    with Job(file, 2, "runs/stopped", options) as job:
        ended = job.end()
        assert [code for code, _ in ended] == [0, 0], ended
    assert replies(stopped) == replies(two)
    assert left(stopped) == left(two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "Vowels failed to score '"),
        ("is infinite", "reward: got inf for '"),
        ("does not answer", "url: got no answer"),
    ],
)
def test_a_fault_in_one_process_stops_all_at_a_checkpoint(tmp_path, fault, message):
    """One process goes on from it."""
    reward = "reward=Letters()," if fault == "does not answer" else ""
    file, folder = program(tmp_path, steps=40, reward=reward), tmp_path / "runs" / "vowels"
    with Job(file, 2, "runs/vowels") as job:
        job.reach(folder, 1)
        (tmp_path / "fault").write_text(fault)
        for code, errors in job.end():
            assert code == 2, errors
            assert message in errors.splitlines()[-1]
    with Checkpoints(folder / "checkpoints" / "rl") as checkpoints:
        done = checkpoints.latest_step()
    assert done == max(losses(folder)) < 40
    (tmp_path / "fault").unlink()
    with Job(file, 1, "runs/vowels") as job:
        ended = job.end()
        assert [code for code, _ in ended] == [0], ended
    assert list(losses(folder)) == list(range(1, 41))
