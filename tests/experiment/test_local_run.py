"""A run with local checkpoints: resumed from them to the same bits and records, and never from what is not its own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from tiny_experiment import EXPERIMENT, PRETRAIN, equal, params

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed import sharding
from gptjax.distributed.sharding import MeshConfig
from gptjax.monitor import metrics
from gptjax.monitor.times import WallTime
from gptjax.types import UserError

STAGE = dataclasses.replace(PRETRAIN, steps=8, save_every=6, log_every=1, evaluations=(), prompts=())
TINY = dataclasses.replace(EXPERIMENT, stages={"pretrain": STAGE})
LOCAL = {"save_local_every": 2}


class Lost(Exception):
    """The end of a process."""


@pytest.fixture
def lost_at(monkeypatch):
    """Function: the process is lost at the batch of this number, counted from now."""
    place, left = sharding.global_array, [0]

    def placed(batch, rules):
        left[0] -= 1
        if left[0] == 0:
            raise Lost
        return place(batch, rules=rules)

    monkeypatch.setattr(sharding, "global_array", placed)
    return lambda number: left.__setitem__(0, number)


def lose(run: Path, local: Path, experiment=TINY) -> None:
    with pytest.raises(Lost):
        experiment.run(run, local_checkpoints=str(local), **LOCAL)


def files(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.rglob("*-*") if path.is_file())


def records(folder: Path) -> list[tuple]:
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in metrics.read(folder)]


def start(text: str) -> str:
    return next(line.strip() for line in text.splitlines() if line.strip().startswith("start "))


def test_a_lost_run_goes_on_from_them_as_if_nothing_had_been(tmp_path, lost_at, capsys):
    """Lost twice before the first checkpoint of the run folder; at its end they are deleted."""
    whole, run, local = tmp_path / "whole", tmp_path / "run", tmp_path / "local"
    assert TINY.run(whole) == 0
    for number in (6, 2):  # in the sixth step, and, from the fourth, in the sixth again
        lost_at(number)
        lose(run, local)
    assert files(local) == ["2", "4"]
    capsys.readouterr()
    assert TINY.run(run, local_checkpoints=str(local), **LOCAL) == 0
    assert start(capsys.readouterr().out) == f"start    step 4 of the local checkpoints in {local}"
    assert equal(params(run, "pretrain"), params(whole, "pretrain"))
    assert records(run) == records(whole)
    assert files(local) == []
    wall = WallTime(metrics.read_wall(run))
    assert wall.parts["local_checkpoint"] > 0
    assert "local checkpoints, each of which blocked training for" in (run / "report" / "report.md").read_text()


def test_the_run_folder_is_used_where_it_is_newer_or_they_are_gone(tmp_path, lost_at, capsys):
    run, local = tmp_path / "run", tmp_path / "local"
    lost_at(9)  # the sixth step is in the folder, with one batch of its validation
    lose(run, local)
    assert files(local) == ["2", "4"]
    with Checkpoints(run / "checkpoints" / "pretrain") as saved:
        assert saved.steps() == [6]
    shutil.rmtree(local)
    capsys.readouterr()
    lost_at(1)
    lose(run, local)
    found = start(capsys.readouterr().out)
    assert found == f"start    step 6 of {run}/checkpoints/pretrain; local checkpoints in {local}: none is newer"


def test_a_run_begun_anew_does_not_know_those_of_the_old_one(tmp_path, lost_at, capsys):
    run, local = tmp_path / "run", tmp_path / "local"
    lost_at(6)
    lose(run, local)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(run)
    for folder in (run, copy):
        capsys.readouterr()
        lost_at(1)
        lose(folder, local)
        assert start(capsys.readouterr().out) == "start    new parameters"


def test_another_mesh_takes_them(tmp_path, lost_at, capsys):
    run, local = tmp_path / "run", tmp_path / "local"
    lost_at(6)
    lose(run, local)
    capsys.readouterr()
    lost_at(1)
    lose(run, local, dataclasses.replace(TINY, mesh=MeshConfig(data=4, tensor=2)))
    assert "step 4 of the local checkpoints" in start(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save_local_every": 3}, "save_local_every: got 3, must be None without local_checkpoints"),
        ({"save_local_every": 0, "local_checkpoints": "l"}, "save_local_every: got 0, must be at least 1"),
    ],
)
def test_wrong_options_are_named(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TINY.run(tmp_path / "run", **given)
