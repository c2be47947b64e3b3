"""Everything derived from a checkpoint (the next stage, results of evaluations) is made again when that changes."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from gptjax import data, evals, load, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.experiment import run_folder
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.models.identity import content_digest
from gptjax.nn import LoRA, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.types import UserError


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Experiment:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").write_text("\n\n".join(f"a line about {i}" for i in range(200)))
    source = data.Text(str(tmp_path / "text"))
    first = Stage(
        data=data.Pretrain(source, length=16, batch=8),
        objective=NextToken(),
        optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Constant()),
        steps=2,
        eval_sequences=4,
        prompts=(),
        evaluations=(evals.BitsPerByte(source, documents=4, length=16),),
    )
    model = TransformerConfig(vocab=261, layers=1, width=8, heads=2)
    second = dataclasses.replace(first, steps=1, optimizer=optim.AdamW(learning_rate=1e-3, schedule=optim.Constant()))
    return Experiment(model, data.Bytes(), {"first": first, "second": second})


def longer(experiment: Experiment, **changes) -> Experiment:
    first = dataclasses.replace(experiment.stages["first"], **changes)
    return dataclasses.replace(experiment, stages=experiment.stages | {"first": first})


def params(folder, stage):
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        return jax.device_get(checkpoints.restore_params().state)


def report(folder, stage):
    return json.loads((folder / "report" / f"{stage}.json").read_text())


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.alone
def test_a_stage_is_trained_again_after_an_earlier_one(experiment, tmp_path, capsys):
    folder = tmp_path / "run"
    experiment.run(folder)
    before, results = params(folder, "second"), report(folder, "second")["results"]
    extended = longer(experiment, steps=4)
    assert extended.run(folder, accept_changes=True) == 0
    assert "second: was trained from step 2 of first, which is not step 4 of first" in capsys.readouterr().out
    fresh = tmp_path / "fresh"
    extended.run(fresh)
    assert equal(params(folder, "second"), params(fresh, "second"))
    assert report(folder, "second")["results"] == report(fresh, "second")["results"] != results
    assert equal(jax.device_get(Checkpoints(folder / "stale" / "second-1").restore_params().state), before)
    assert not (fresh / "stale").exists()
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"second: was trained from step 4 of first.*train it again with --accept_ch"):
        run_folder.set_stale_aside(folder, "second", {"stage": "first", "step": 9, "sha256": ""}, False, console)


def test_results_are_of_the_checkpoint_and_of_the_evaluations(experiment, tmp_path):
    folder = tmp_path / "run"
    experiment.run(folder)
    whole, before = report(folder, "first"), params(folder, "first")
    for damaged in (
        "",
        "[]",
        "[" * 9_999,
        json.dumps(whole | {"results": [{}]}),
        json.dumps(whole | {"checkpoint": None}),
    ):
        (folder / "report" / "first.json").write_text(damaged)
        experiment.run(folder)
        assert report(folder, "first") == whole
    (evaluation,) = experiment.stages["first"].evaluations
    other = longer(experiment, evaluations=(dataclasses.replace(evaluation, length=8),))
    other.run(folder, accept_changes=True)
    assert report(folder, "first")["results"] != whole["results"]
    assert equal(params(folder, "first"), before), "nothing is trained again for an evaluation"
    assert not (folder / "stale").exists()


def test_every_checkpoint_is_ranked_and_the_next_stage_starts_from_the_best(experiment, tmp_path):
    folder = tmp_path / "run"
    first = dataclasses.replace(
        experiment.stages["first"], steps=5, save_every=2, evaluate_every=100, max_to_keep=9, evaluations=()
    )
    still = optim.AdamW(learning_rate=1e-30, schedule=optim.Constant())
    second = dataclasses.replace(first, steps=1, optimizer=still, init_from="best")
    dataclasses.replace(experiment, stages={"first": first}).run(folder)
    with Checkpoints(folder / "checkpoints" / "first") as saved:
        assert saved.steps() == [2, 4, 5]
        assert all(isinstance(saved.content(step)["loss"], float) for step in saved.steps())
        saved.rank(2, 0.5)
        expected = [jax.device_get(saved.restore_params(step).state) for step in (2, 4)]
    whole = dataclasses.replace(experiment, stages={"first": first, "second": second})
    whole.run(folder, accept_changes=True)
    assert equal(params(folder, "second"), expected[0])
    with Checkpoints(folder / "checkpoints" / "first") as saved:
        saved.rank(4, 0.25)
    with pytest.raises(UserError, match=r"^second: was trained from step 2 of first, which is not step 4 of first"):
        whole.run(folder)
    whole.run(folder, accept_changes=True)
    assert equal(params(folder, "second"), expected[1])
    with pytest.raises(UserError, match=r"^first\.init_from: got best, must be latest: no stage is before the first"):
        dataclasses.replace(experiment, stages={"first": second})


def test_what_a_run_starts_from_is_known_by_its_content(experiment, tmp_path):
    base, folder, moved = tmp_path / "base", tmp_path / "run", tmp_path / "moved"
    first = dataclasses.replace(experiment.stages["first"], evaluations=())
    dataclasses.replace(experiment, stages={"first": first}).run(base)
    started = dataclasses.replace(
        experiment, tokenizer=data.LoadTokenizer(str(base)), init_from=str(base), stages={"first": first}
    )
    started.run(folder)
    shutil.copytree(base, moved)
    dataclasses.replace(started, init_from=str(moved)).run(folder)
    adapted = dataclasses.replace(first, adapter=LoRA(rank=2, match=("q",)))
    dataclasses.replace(started, stages={"first": adapted}).run(tmp_path / "adapted")
    load(tmp_path / "adapted")
    shutil.rmtree(base)
    started.run(folder)  # it is done, and needs the model no more
    dataclasses.replace(experiment, seed=1, stages={"first": first}).run(base)
    with pytest.raises(
        UserError, match=rf"^first: was trained from other content of {base}; train it again with --acc"
    ):
        started.run(folder)
    with pytest.raises(UserError, match=rf"^init_from: got {base}, whose files are not those that the adapters in"):
        load(tmp_path / "adapted")
    load(moved).save(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "same")
    assert content_digest(tmp_path / "saved") == content_digest(tmp_path / "same") != content_digest(moved)
    (tmp_path / "same" / "config.json").write_text("{}")
    assert content_digest(tmp_path / "saved") != content_digest(tmp_path / "same")


def test_a_mirror_waits_for_the_lock(experiment, tmp_path):
    folder, bucket = tmp_path / "run", tmp_path / "bucket"
    experiment.run(folder, mirror=str(bucket))
    assert (bucket / "checkpoints" / "second").exists()
    with run_folder.lock(tmp_path / "other"), pytest.raises(UserError, match="is in use by another run"):
        experiment.run(tmp_path / "other", mirror=str(bucket))
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["run.lock"]
