"""A job that loses a host goes on from the local checkpoints of the others, or from the run folder, with a spare or
without."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from job import TINY, Job, losses

LOCAL = ("--local_checkpoints", "hostPROCESS", "--save_local_every", "2")
SHARDED = ("--mesh.data", "1", "--mesh.fsdp", "-1")


def lose(job: Job, folder: Path, step: int, host: int) -> None:
    """Kill a process without warning after this step; the others end by themselves."""
    job.reach(folder, step)
    job.processes[host].kill()
    job.end()


def started(job: Job) -> str:
    """The line that says where the job starts, which is run to its end."""
    outputs = [process.communicate(timeout=300) for process in job.processes]
    assert [process.returncode for process in job.processes] == [0] * len(outputs), outputs
    return next(line.strip() for line in outputs[0][0].splitlines() if line.strip().startswith("start "))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), SHARDED], ids=["copies", "sharded"])
def test_a_host_is_lost_with_its_memory(tmp_path, mesh):
    """Parameters on both hosts, or sharded over them. The bits are those of a job that was left alone."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")).replace("save_every=5", "save_every=30"))
    with Job(file, 2, "runs/alone", mesh) as job:
        assert "new parameters" in started(job)
    with Job(file, 2, options=(*mesh, *LOCAL)) as job:
        lose(job, folder, 9, host=1)
    shutil.rmtree(tmp_path / "host1")  # a spare has nothing
    with Job(file, 2, options=(*mesh, *LOCAL)) as job:
        lose(job, folder, 19, host=0)
    assert losses(folder)[9] == losses(tmp_path / "runs" / "alone")[9]
    shutil.rmtree(tmp_path / "host0")
    with Job(file, 2, options=(*mesh, *LOCAL)) as job:
        found = started(job)
    assert "of the local checkpoints in" in found, found
    assert "shards of it from other hosts" in found, found
    assert losses(folder) == losses(tmp_path / "runs" / "alone")


@pytest.mark.slow
def test_fewer_go_on_and_the_run_folder_is_the_last_resort(tmp_path):
    """One of two hosts is lost, and the other goes on alone; then the run folder has all there is."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    file.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")).replace("save_every=5", "save_every=11"))
    with Job(file, 2, options=(*SHARDED, *LOCAL)) as job:
        lose(job, folder, 10, host=1)
    with Job(file, 1, options=(*SHARDED, *LOCAL)) as job:
        lose(job, folder, 24, host=0)  # the save at step 22 waits for the one at step 11
    assert sorted(losses(folder))[:24] == list(range(1, 25))
    shutil.rmtree(tmp_path / "host0")
    with Job(file, 1, options=(*SHARDED, *LOCAL)) as job:
        found = started(job)
    assert re.search(rf"step (11|22|33|44|55) of {folder}/checkpoints/main; local checkpoints in", found), found
    assert found.endswith("none is newer")
    assert list(losses(folder)) == list(range(1, 61))
