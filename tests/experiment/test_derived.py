"""Everything derived from a checkpoint (the next stage, results of evaluations) is made again when that changes."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from gptjax import data, evals, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.experiment import run_folder
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import TransformerConfig
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
