"""Laws of an experiment: what is done is not done again, and neither a mistake nor damage spoils what is there."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_experiment import CHAT, EXPERIMENT, PRETRAIN, Words, equal, left, params

import gptjax
from gptjax import optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.cli import main as command_line
from gptjax.cli import run as launcher
from gptjax.config import from_json
from gptjax.distributed import sharding
from gptjax.distributed.sharding import MeshConfig
from gptjax.io import atomic
from gptjax.monitor import metrics
from gptjax.train.loop import train
from gptjax.types import UserError


@pytest.fixture(scope="module")
def specs() -> dict[str, PartitionSpec]:
    """Sharding of an MLP's weights [L, D, F] at the end of each stage of the run `finished`."""
    return {}


@pytest.fixture(scope="module")
def finished(cache, specs, tmp_path_factory) -> Path:
    """The folder of a finished run; a test that changes it takes a copy."""

    def noting(stage, name, *args, **options):
        params = train(stage, name, *args, **options)
        specs[name] = params["blocks"]["mlp"]["up"].sharding.spec
        return params

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.experiment.experiment.train", noting)
        assert EXPERIMENT.run(folder) == 0
    return folder


def test_the_folder_holds_all_of_a_run(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    assert {"config.json", "metrics.jsonl", "tokenizer", "tensorboard/pretrain", "tensorboard/chat"} <= names
    assert {f"checkpoints/{stage}/{step}" for stage in ("pretrain", "chat") for step in (2, 4)} <= names
    assert {"report/report.md", "report/pretrain.png", "report/chat.png"} <= names
    config = json.loads((finished / "config.json").read_text())
    assert from_json(config["experiment"]) == EXPERIMENT
    assert config["versions"]["jax"] == jax.__version__
    assert [line["stage"] for line in metrics.read(finished) if "sample" in line] == ["pretrain"]


def test_the_second_stage_begins_with_the_average_of_the_first(finished):
    with Checkpoints(finished / "checkpoints/chat") as checkpoints:
        first = checkpoints.restore_params(2).state  # after two steps of Adam, of at most its learning rate each
    peak = CHAT.optimizer.learning_rate
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), params(finished, "pretrain"), first)
    assert 0 < max(jax.tree.leaves(far)) < 4 * peak
    untouched = params(finished, "pretrain", ema=False)
    assert not equal(untouched, params(finished, "pretrain"))


def test_every_stage_shares_out_the_parameters_as_declared(finished, specs):
    shared = PartitionSpec(None, "fsdp", "tensor")
    assert specs == {"pretrain": shared, "chat": shared}


def test_a_run_says_what_it_can_do(finished, monkeypatch, tmp_path, capsys):
    """Chat only where a stage taught it; and a profile of a finished run is none."""
    monkeypatch.chdir(finished.parent)
    EXPERIMENT.run(finished, profile=range(1, 2))
    out = capsys.readouterr().out
    assert out.endswith('\n\nNow try:\n  gptjax chat run\n  gptjax generate run --prompt "..."\n')
    nothing = "profile: {} has done its 4 steps, so there is none to trace; choose another folder with --out\n"
    assert all(nothing.format(name) in out for name in ("pretrain", "chat"))
    alone = dataclasses.replace(EXPERIMENT, stages={"pretrain": dataclasses.replace(PRETRAIN, evaluations=())})
    alone.run(tmp_path / "alone")
    out = capsys.readouterr().out
    assert "profile" not in out
    assert f'\n\nNow try:\n  gptjax generate {tmp_path / "alone"} --prompt "..."\n' in out
    for folder, notes in ((finished, 0), (tmp_path / "alone", 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit"))
        assert command_line.main(["chat", str(folder)]) == 0
        assert capsys.readouterr().err.count(f"({folder} was trained on text, not on conversations: ") == notes


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    for name in ("train", "model_class"):
        monkeypatch.setattr(f"gptjax.experiment.experiment.{name}", None)
    monkeypatch.setattr(Words, "documents", None)  # the text is not needed any more
    before = left(finished)
    assert EXPERIMENT.run(finished) == 0
    assert left(finished) == before


def test_a_damaged_end_of_a_stage_is_made_again(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    largest = max((folder / "checkpoints/pretrain/4").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert EXPERIMENT.run(folder) == 0
    for stage in ("pretrain", "chat"):
        assert equal(params(folder, stage), params(finished, stage))
    for name in ("pretrain.json", "chat.json", "pretrain.png"):
        assert (folder / "report" / name).read_bytes() == (finished / "report" / name).read_bytes()
    again, before = ((path / "report" / "report.md").read_text().split("## Time")[0] for path in (folder, finished))
    timed = re.compile(r"(Speed|Saving): .*")
    assert timed.sub("", again) == timed.sub("", before)


def test_another_configuration_is_refused_until_it_is_accepted(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("from tiny_experiment import EXPERIMENT as experiment")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = left(folder)
    command = [str(tmp_path / "mine.py"), "--out", str(folder), "--chat.save_every", "77"]
    assert launcher.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} has another configuration: chat.save_every: 2 → 77. ")
    assert error.count("\n") == 1
    assert left(folder) == before
    assert launcher.main([*command, "--accept_changes"]) == 0
    assert "changed: chat.save_every: 2 → 77\n" in capsys.readouterr().out
    assert launcher.main(command) == 0  # it is the folder's configuration now


def test_a_run_goes_on_on_another_mesh(tmp_path, monkeypatch):
    """Without being told to; what it reads is the same, and what it learns too but for the order of sums."""
    steps, rate, eps = 6, 1e-2, 1e-3
    adam = optim.AdamW(learning_rate=rate, schedule=optim.Constant(), eps=eps)
    stage = dataclasses.replace(PRETRAIN, optimizer=adam, steps=steps, log_every=1, evaluations=(), prompts=())
    experiment = dataclasses.replace(EXPERIMENT, stages={"pretrain": stage}, mesh=MeshConfig(data=4, fsdp=2))
    place, read, stop = sharding.global_array, [], False

    def noting(batch, rules):
        read.append(np.asarray(batch.tokens).tolist())
        if stop and len(read) == 4:  # two steps, the validation of their checkpoint, and one more
            signal.raise_signal(signal.SIGTERM)
        return place(batch, rules=rules)

    monkeypatch.setattr(sharding, "global_array", noting)
    experiment.run(tmp_path / "whole")
    expected, read, stop = read, [], True
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tmp_path / "run")
    assert len(read) == 4
    dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=4, tensor=2)).run(tmp_path / "run")
    assert read == expected
    found, whole = (
        {line["step"]: line["loss"] for line in metrics.read(folder) if "loss" in line}
        for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert list(found) == list(whole) == [*range(1, steps + 1)]
    # A step makes at most rate / eps of the rounding in its gradient (of length 1), as in tests/train/test_step.py.
    rounding = (8 * 32) ** 0.5 * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(list(found.values()), list(whole.values()), atol=steps * rate / eps * rounding)


NO_NAMES = ("", ".", "..", "../../x", "/x", "a/b", "a\\b", ".x", "a b", "a\n", "é", "\0", "a" * 101)


@pytest.mark.parametrize("name", NO_NAMES)
def test_the_name_of_a_stage_is_not_a_path(finished, tmp_path, name):
    """A stage's name is that of its folder: nothing is written or read outside the run."""
    with pytest.raises(UserError, match=r"^stages: got the name .*, must be 1 to 100 letters, digits"):
        dataclasses.replace(EXPERIMENT, stages={name: PRETRAIN})
    brought = json.loads((finished / "config.json").read_text())
    brought["experiment"]["stages"] = {name: brought["experiment"]["stages"]["pretrain"]}
    (tmp_path / "config.json").write_text(json.dumps(brought))
    with pytest.raises(UserError, match=r"config\.json: stages: got the name "):
        gptjax.load(tmp_path)
    assert dataclasses.replace(EXPERIMENT, stages={"Pre-train_1.b": PRETRAIN}).stages


def test_a_configuration_that_is_not_the_checkpoints_is_refused(finished, tmp_path):
    """One bit of config.json, anywhere: the same model, or one line that says what differs."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    text = path.read_text()

    def said(before: str, after: str) -> str:
        assert before in text
        path.write_text(text.replace(before, after, 1))
        with pytest.raises(UserError) as error:
            gptjax.load(path.parent)
        return str(error.value).partition(f"{path}: ")[2]

    differs = "differs from the configuration of the newest checkpoint of chat: "
    assert said('"heads": 2', '"heads": 4').startswith(f"{differs}model.heads: 2 → 4; restore it")
    assert said("gptjax.nn.SwiGLU", "gptjax.nn.GeGLU").startswith(f"{differs}model.mlp: ")
    assert said('"length": 64', '"length": 65').startswith(f"{differs}model.positions.length: 64 → 65")
    assert said('"model"', '"mofel"').startswith(f"{differs}model: ")
    assert said('"chat"', '"chau"').startswith("names no stage chat, of which there are checkpoints; restore it")
    path.write_text(text)
    lm, damaged = gptjax.load(path.parent), 0
    for at, bit in np.random.default_rng(0).integers([0, 0], [len(text), 8], (40, 2)):
        content = bytearray(text.encode())
        content[at] ^= 1 << bit
        path.write_bytes(content)
        try:
            found = gptjax.load(path.parent)
        except UserError as error:
            damaged += "\n" not in str(error)
        else:
            assert (found.config, found.context) == (lm.config, lm.context)
            damaged += 1
    assert damaged == 40


def test_two_runs_in_one_folder(finished, monkeypatch, capsys):
    """The second is refused in one line, and touches nothing. A run that has ended, however it did, holds no lock."""
    monkeypatch.setattr("gptjax.experiment.catalogue.load", lambda _: types.SimpleNamespace(experiment=EXPERIMENT))
    command = ["quickstart", "--out", str(finished)]
    before = left(finished)
    with atomic.lock(finished / "run.lock"):
        assert launcher.main(command) == 2
    line = f"error: {finished} is in use by another run; wait for its end, or choose another folder with --out\n"
    assert capsys.readouterr() == ("", line)
    assert left(finished) == before
    assert launcher.main(command) == 0
