"""Regression as an experiment: texts with numbers, to a `RegressorModel`."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import gptjax
from gptjax import data, evals, optim
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import ClassifierConfig, Mean, RegressorConfig, TransformerConfig
from gptjax.objectives import Classification, Regression
from gptjax.types import Labelled, UserError

BACKBONE = TransformerConfig(vocab=264, layers=1, width=32, heads=2)


def test_the_loss_is_its_equation_and_padding_does_not_count():
    ones = np.ones((3, 4), np.int32)
    segments = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [0, 0, 0, 0]])
    labels = np.array([[1.0, -2.0], [0.5, 0.0], [0.0, 0.0]], np.float32)
    batch = Labelled(ones, ones, ones.astype(np.float32), segments, ones, labels=labels)
    numbers = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    found = Regression()(lambda *_, **__: ((numbers, None), {}), {}, batch)
    assert float(found["loss"][0]) == (0 - 1) ** 2 + (1 + 2) ** 2 + (2 - 0.5) ** 2
    assert float(found["absolute_error"][0]) == 1 + 3 + 1.5
    assert float(found["loss"][1]) == 3


@pytest.mark.alone
def test_numbers_are_learned(tmp_path, monkeypatch):
    """The share of x in a text."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    rng, path = np.random.default_rng(0), tmp_path / "numbers.jsonl"
    texts = ["".join(rng.choice(list("xab"), 8, p=(p, *[(1 - p) / 2] * 2))) for p in rng.uniform(0, 1, 300)]
    path.write_text("\n".join(json.dumps({"text": text, "label": text.count("x") / 8}) for text in texts))
    source = data.NumbersJsonl(str(path))
    read = data.Regress(source, length=16, batch=32)
    adam = optim.AdamW(learning_rate=1e-2, weight_decay=0.0)
    fit = Stage(read, Regression(), adam, steps=80, prompts=(), evaluations=(evals.Correlation(source),))
    Experiment(RegressorConfig(BACKBONE, Mean(), bias=True), data.Bytes(), {"fit": fit}).run(tmp_path / "run")
    values = json.loads((tmp_path / "run" / "report" / "fit.json").read_text())["results"][0]["values"]
    assert values["pearson"] > 0.9
    assert values["spearman"] > 0.9
    model = gptjax.load(tmp_path / "run", kind=gptjax.RegressorModel)
    few, many = model.predict(["xabababa", "xxxxxxab"])
    assert few == pytest.approx(1 / 8, abs=0.15)
    assert many == pytest.approx(6 / 8, abs=0.15)

    of_classes = dataclasses.replace(fit, objective=Classification(), evaluations=())
    with pytest.raises(UserError, match="data: got Regress, which is for regressor models, must be for classifier"):
        Experiment(ClassifierConfig(BACKBONE, 2), data.Bytes(), {"fit": of_classes})
    for label, shown in (('"high"', "'high'"), ("NaN", "'nan'"), ("true", "'True'")):
        path.write_text(f'{{"text": "a", "label": {label}}}')
        with pytest.raises(UserError, match=rf"numbers\.jsonl:1: label: got {shown}, must be a finite number"):
            list(data.NumbersJsonl(str(path), validation=0.0).documents("train"))
