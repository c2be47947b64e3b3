"""Several processes of one job: stopped by a signal to one, brought down by the death of one, resumed by fewer."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from job import HEARTBEAT, TINY, Job, losses

from gptjax.distributed import processes
from gptjax.monitor import metrics
from gptjax.monitor.times import WallTime

BEYOND = 11
"""Steps after a checkpoint in which two more are begun, the second of which waits for the first to be finished."""


def saved(folder: Path) -> int:
    return max(int(path.parent.name) for path in (folder / "checkpoints" / "main").glob("*/manifest.json"))


def assert_ended_as_lost(code: int, errors: str) -> None:
    """A process found another gone: by an error in its step, or jax's runtime was first, which aborts."""
    if code == processes.LOST:
        assert "another process of the job is gone" in errors, errors
        assert "to resume from the last checkpoint" in errors, errors
    else:
        assert code == -signal.SIGABRT, errors
        assert "another task died" in errors, errors


@pytest.mark.slow
def test_processes_stop_together_die_together_and_fewer_go_on(tmp_path):
    """Four get SIGTERM, two go on and the second is killed, two more, on another mesh, and the first is, one ends it:
    losses and data as if it had been one."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")))

    with Job(file, 1, "runs/alone") as alone:
        ended = alone.end()
        assert [code for code, _ in ended] == [0], ended
    order = alone.read()

    with Job(file, 4) as job:
        job.reach(folder, 3)
        job.processes[2].send_signal(signal.SIGTERM)
        for code, errors in job.end():
            assert code == 130, errors
            assert "stopped; to go on" in errors
    stopped = saved(folder)
    assert list(losses(folder)) == list(range(1, stopped + 1))
    assert job.read() == order[:stopped]

    with Job(file, 2) as job:
        job.reach(folder, stopped + BEYOND)
        job.processes[1].kill()
        start = time.monotonic()
        (code, errors), _ = job.end()
        assert time.monotonic() - start < HEARTBEAT + 10
        assert_ended_as_lost(code, errors)
    read = job.read()
    assert read == order[stopped : stopped + len(read)]

    before = saved(folder)
    assert before > stopped
    shared = ("--mesh.data", "1", "--mesh.fsdp", "2")  # the parameters, between the processes
    with Job(file, 2, options=shared) as job:
        job.reach(folder, before + BEYOND)
        job.processes[0].kill()  # the one that the others meet at
        start = time.monotonic()
        _, (code, errors) = job.end()
        assert time.monotonic() - start < HEARTBEAT + 10
        assert_ended_as_lost(code, errors)
    read = job.read()
    assert read == order[before : before + len(read)]

    last = saved(folder)
    assert last > before
    with Job(file, 1) as job:
        ended = job.end()
        assert [code for code, _ in ended] == [0], ended
    assert job.read() == order[last:]
    expected, found = losses(tmp_path / "runs" / "alone"), losses(folder)
    assert list(found) == list(expected) == list(range(1, 61))
    # Sums in another order: float32's rounding, grown by the steps that AdamW has divided by small numbers.
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)
    lines = metrics.read_wall(folder)
    wall = WallTime(lines)
    assert wall.total == pytest.approx(lines[-1]["time"] - lines[0]["time"], abs=0.1)
    assert wall.counts["down"] == 3
    assert min(wall.parts[part] for part in ("steps", "lost", "restore", "down")) > 0


SLOW_DISK = """
from gptjax.checkpoint import manifest

write = manifest.write


def slowly(*args):
    time.sleep(PAUSE)
    write(*args)


manifest.write = slowly
"""


@pytest.mark.slow
def test_the_first_process_is_waited_for_until_a_checkpoint_is_finished(tmp_path):
    """The end of a run, and of one that is stopped: its last checkpoint takes longer than a process may be missing."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    slow = SLOW_DISK.replace("PAUSE", str(HEARTBEAT / 2 + 3))
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")).replace("save_every=5", "save_every=60") + slow)
    with Job(file, 2, heartbeat=HEARTBEAT // 2) as job:
        job.reach(folder, 3)
        job.processes[1].send_signal(signal.SIGTERM)
        ended = job.end()
        assert [code for code, _ in ended] == [130, 130], ended
    assert saved(folder) == max(losses(folder))
    with Job(file, 2, heartbeat=HEARTBEAT // 2) as job:
        ended = job.end()
        assert [code for code, _ in ended] == [0, 0], ended
    assert saved(folder) == 60
    parts = {path.name for path in (folder / "checkpoints" / "main" / "60").glob("manifest.json*")}
    assert parts == {"manifest.json"}


FULL_DISK = """
import errno
from gptjax.checkpoint import manifest

write = manifest.write


def full(folder, *args):
    if folder.name == "10":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(folder, *args)


manifest.write = full
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_first_process_ends_all(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")) + FULL_DISK)
    with Job(file, 2) as job:
        ended = job.end()
    assert [code for code, _ in ended] == [2, 2], ended
    assert "No space left" in ended[0][1]
    assert all(errors.endswith("the last good checkpoint is step 5\n") for _, errors in ended), ended
    assert [path.name for path in (folder / "checkpoints" / "main").iterdir()] == ["5"]


@pytest.mark.slow
def test_processes_keep_a_mirror(tmp_path):
    """Two get SIGTERM and their folder is lost; two others go on from the copy, and complete it."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder, mirror = tmp_path / "tiny.py", tmp_path / "runs" / "tiny", tmp_path / "bucket"
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")))
    options = "runs/tiny", ("--mirror", str(mirror))
    with Job(file, 2, *options) as job:
        job.reach(folder, 3)
        job.processes[1].send_signal(signal.SIGTERM)
        assert [code for code, _ in job.end()] == [130, 130]
    stopped = saved(folder)
    assert saved(mirror) == stopped
    shutil.rmtree(folder)
    with Job(file, 2, *options) as job:
        ended = job.end()
        assert [code for code, _ in ended] == [0, 0], ended
    assert len(job.read()) == 60 - stopped
    assert list(losses(mirror)) == list(losses(folder)) == list(range(1, 61))
    assert saved(mirror) == saved(folder) == 60


PRIVATE = """
import dataclasses, secrets
from gptjax.train.privacy import DifferentialPrivacy

secrets.randbits = lambda bits: 1234567890123456789
stage = dataclasses.replace(
    experiment.stages["main"],
    data=dataclasses.replace(experiment.stages["main"].data, batch=32),
    steps=10,
    privacy=DifferentialPrivacy(epsilon=8.0, delta=1e-3, clip=1.0),
)
experiment = dataclasses.replace(experiment, stages={"main": stage})
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["tensor", "context", "noise"])
def test_two_learn_what_one_does(tmp_path, shared):
    """Two processes that hold parts of the same rows, and read the same ones; or that draw rows, clip gradients and add
    noise."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file = tmp_path / "tiny.py"
    file.write_text((TINY + PRIVATE * (shared == "noise")).replace("TEXT", str(tmp_path / "text.txt")))
    options = () if shared == "noise" else ("--main.steps", "10", "--mesh.data", "1", f"--mesh.{shared}", "-1")
    for count in (1, 2):
        with Job(file, count, f"runs/{count}", options) as job:
            ended = job.end()
            assert [code for code, _ in ended] == [0] * count, ended
    one, two = losses(tmp_path / "runs" / "1"), losses(tmp_path / "runs" / "2")
    assert list(two) == list(one) == list(range(1, 11))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)


HANGING = """
experiment = dataclasses.replace(
    experiment, stages={"main": dataclasses.replace(experiment.stages["main"], hang_timeout=2.0, save_every=60)}
)


def stuck(batch, rules, seen=[]):
    seen.append(batch)
    if jax.process_index() == 1 and len(seen) == 10:
        time.sleep(600)
    return noted(batch, rules)


sharding.global_array = stuck
"""


@pytest.mark.slow
def test_every_process_says_where_it_hangs(tmp_path):
    """The second never gets its tenth batch; the first waits for its part of the step."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    file.write_text("import dataclasses\n" + TINY.replace("TEXT", str(tmp_path / "text.txt")) + HANGING)
    reports = [folder / "hang" / f"{number}.txt" for number in (0, 1)]
    with Job(file, 2) as job:
        limit, second = time.monotonic() + 120, ""
        while "in stuck" not in second and time.monotonic() < limit:  # on a busy machine an earlier step hangs too
            assert all(process.poll() is None for process in job.processes), job.end()
            time.sleep(1)
            second = reports[1].read_text() if reports[1].exists() else ""
        time.sleep(4)  # until the first has waited as long, and both are whole
        first, second = (path.read_text() for path in reports)
    assert "in stuck" in second
    assert "in stuck" not in first
    assert "loop.py" in first


POISONED = """
import dataclasses
import jax.numpy as jnp
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.train.divergence import RollBack

if os.environ["JAX_PROCESS_ID"] == "1":  # to which a folder of the network is empty yet
    Checkpoints._finished = lambda self: []


class Poisoned(objectives.NextToken):
    # The loss is not a number where a "!" is read.
    def __call__(self, apply, params, batch, key=None):
        metrics = super().__call__(apply, params, batch, key)
        total, weight = metrics["loss"]
        bad = jnp.any(batch.tokens == MARK)
        return metrics | {"loss": (jnp.where(bad, jnp.nan, 1.0) * total, weight)}


MARK = data.TrainCharacters().build(iter([open("TEXT").read()])).encode("!")[0]
stage = dataclasses.replace(
    experiment.stages["main"], objective=Poisoned(), divergence=RollBack(limit=20), steps=30
)
experiment = dataclasses.replace(experiment, stages={"main": stage})
"""


@pytest.mark.slow
def test_processes_roll_back_together(tmp_path):
    """Two find the same steps bad, go back to the same step, leave out the same batches, and learn what one does."""
    text = "the quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "text.txt").write_text("!" + text * 2 + "!" + text * 2)
    file = tmp_path / "tiny.py"
    file.write_text((TINY + POISONED).replace("TEXT", str(tmp_path / "text.txt")))
    found = []
    for count in (1, 2):
        with Job(file, count, f"runs/{count}") as job:
            ended = job.end()
            assert [code for code, _ in ended] == [0] * count, ended
        folder = tmp_path / "runs" / str(count)
        lines = [line for line in metrics.read(folder) if "rolled_back_from" in line]
        bad = [(line["step"], line["rolled_back_from"], line["batches_skipped"]) for line in lines]
        found.append((bad, losses(folder)))
    (bad, one), (bad_of_two, two) = found
    assert bad == bad_of_two != []
    assert list(one) == list(two)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)
