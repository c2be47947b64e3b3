"""An experiment that cannot be, or a folder that cannot be used, is refused in one line before anything is trained."""

from __future__ import annotations

import dataclasses
import errno
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_experiment import CHAT, EXPERIMENT, PRETRAIN, Sums, Words

from gptjax import data, evals
from gptjax.cli import run as launcher
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment import run_folder
from gptjax.experiment.experiment import Stage
from gptjax.io import atomic
from gptjax.nn import TransformerConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Monologues(Sums):
    """Conversations without an answer."""

    def documents(self, split: str) -> Iterator[tuple[data.Message, ...]]:
        for talk in super().documents(split):
            yield talk[:1]

    def fingerprint(self) -> str:
        return "monologues"


def test_data_of_a_later_stage_are_refused_before_the_first_is_trained(tmp_path, capsys):
    chat = dataclasses.replace(CHAT, data=data.Chat(Monologues(), length=32, batch=8), evaluations=())
    experiment = dataclasses.replace(EXPERIMENT, stages={"pretrain": PRETRAIN, "chat": chat})
    with pytest.raises(UserError, match=r"^chat\.data\.source: Monologues\(\) has nothing to learn for train: "):
        experiment.run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def stages(prompts: tuple[str, ...] = ("a",), accumulate: int = 1, **of_data) -> dict[str, Stage]:
    source = dataclasses.replace(PRETRAIN.data, **of_data)
    return {"x": dataclasses.replace(PRETRAIN, data=source, prompts=prompts, accumulate=accumulate)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {}}, "stages: got none, must be at least one"),
        ({"stages": stages(length=65)}, "x.data.length: got 65, must be at most 64"),
        ({"stages": stages(batch=6)}, "x.data.batch: got 6, must be a multiple of 4"),
        ({"stages": stages(accumulate=4)}, "x.data.batch / x.accumulate: got 2, must be a multiple of 4"),
        ({"stages": stages(prompts=("a" * 70,))}, "x.prompts: got 'aaa.*' of 71 tokens"),
        ({"mesh": MeshConfig(data=3)}, "mesh: data 3 does not fit 8 device"),
        ({"mesh": MeshConfig(data=2, tensor=4)}, "model.heads: got 2, must be a multiple of 4"),
        (
            {"model": TransformerConfig(63, 1, 16, 2)},
            "model.vocab: got 63, must be a multiple of 2, its number of shards on the mesh; change it, mesh.tensor or "
            "rules.vocab",
        ),
        ({"model": TransformerConfig(32, 1, 16, 2)}, "model.vocab: got 32, but the tokenizer has 34 ids"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_trained(change, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(EXPERIMENT, **change).run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (evals.Answers(Words()), r"source: got Words\(.*must have questions"),
        (evals.BitsPerByte(Sums()), r"source: got Sums\(.*whose documents are tuple, must be str"),
        (evals.BitsPerByte(data.Jsonl("nowhere.jsonl")), "path: .*nowhere"),
    ],
)
def test_an_evaluation_that_does_not_fit_its_source_is_refused_before_it_is_trained(evaluation, message, tmp_path):
    stage = dataclasses.replace(PRETRAIN, evaluations=(*PRETRAIN.evaluations, evaluation))
    with pytest.raises(UserError, match=rf"^x\.evaluations\.1\.{message}"):
        dataclasses.replace(EXPERIMENT, stages={"x": stage}).run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_of_another_kind_of_model_is_refused():
    stage = dataclasses.replace(PRETRAIN, evaluations=(evals.Accuracy(Words()),))
    with pytest.raises(UserError, match=r"^x\.evaluations\.0: got Accuracy, which measures classifier models, must"):
        dataclasses.replace(EXPERIMENT, stages={"x": stage})


@pytest.mark.parametrize(("field", "value"), [("accumulate", 3), ("ema", 1.0), ("steps", 0), ("save_every", 0)])
def test_a_stage_that_cannot_be_is_refused(field, value):
    with pytest.raises(UserError, match=f"^{field}: got {value}, must "):
        dataclasses.replace(PRETRAIN, **{field: value})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and not a run folder"):
        EXPERIMENT.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    """One line for each of the files of a run; what is there afterwards is whole."""
    sync = atomic._sync
    for full in ("config.json", "tokenizer"):

        def fail(path, full=full):
            if path.name == f"{full}.partial":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(path)

        monkeypatch.setattr(atomic, "_sync", fail)
        with pytest.raises(UserError, match=r"^out: cannot use .*run \(No space left on device\); free some"):
            EXPERIMENT.run(tmp_path / "run")
        assert not (tmp_path / "run" / full).exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path, monkeypatch, capsys):
    """One line with the path and the option, exit code 2, and nothing of the user's is touched."""
    monkeypatch.setattr("gptjax.experiment.catalogue.load", lambda _: types.SimpleNamespace(experiment=EXPERIMENT))
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked" / "run.lock").mkdir(parents=True)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)

    def everything() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "folder" / "run.lock")

    before = everything()

    def said(out: Path | str) -> str:
        assert launcher.main(["quickstart", "--out", str(out)]) == 2
        printed, message = capsys.readouterr()
        assert (printed, message.count("\n")) == ("", 1)
        assert everything() == before
        return message

    assert said(tmp_path / "file") == (
        f"error: --out: cannot use {tmp_path}/file (Not a directory); free some space, make it writable, or choose "
        "another folder with --out\n"
    )
    assert f"cannot use {tmp_path}/file/below (Not a directory)" in said(tmp_path / "file" / "below")
    assert f"cannot use {tmp_path}/{'x' * 300} (File name too long)" in said(tmp_path / ("x" * 300))
    assert f"cannot use {tmp_path}/locked/run.lock (Is a directory)" in said(tmp_path / "locked")
    assert f"cannot use {tmp_path}/folder/config.json (Is a directory)" in said(tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_killed_in_its_first_moment_is_not_something_else(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    assert run_folder.prepare(tmp_path, EXPERIMENT, accept_changes=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_failed_before_it_trained_does_not_hold_its_folder(tmp_path):
    small = dataclasses.replace(EXPERIMENT, model=TransformerConfig(32, 1, 16, 2))
    with pytest.raises(UserError, match=r"^model.vocab: got 32, but the tokenizer has 34 ids"):
        small.run(tmp_path)
    assert "model.vocab: 32 → 64" in run_folder.prepare(tmp_path, EXPERIMENT, accept_changes=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


DIVERGING = """
import dataclasses
from gptjax.train.loop import Diverged

@dataclasses.dataclass(frozen=True)
class Diverging:
    def run(self, folder, accept_changes):
        raise Diverged("pretrain: the loss became nan at step 7; the last good checkpoint is step 6")

experiment = Diverging()
"""


def test_a_run_that_diverges_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "diverging.py").write_text(DIVERGING)
    assert launcher.main([str(tmp_path / "diverging.py"), "--out", str(tmp_path / "run")]) == 3
    message = "error: pretrain: the loss became nan at step 7; the last good checkpoint is step 6\n"
    assert capsys.readouterr() == ("", message)
