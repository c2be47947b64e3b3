"""Laws of canaries: exposure is its definition, and grows with how often a canary was read."""

from __future__ import annotations

import math
import types

import pytest

from gptjax import data, evals, optim
from gptjax.evals import likelihood
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.models.loading import load
from gptjax.nn import TransformerConfig
from gptjax.objectives import NextToken
from gptjax.types import UserError


@pytest.mark.slow
def test_memorised_canaries_are_exposed(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "texts.jsonl"
    text.write_text(
        "".join(f'{{"text": "box {i} is not a secret, and its number is {i * 7919}."}}\n' for i in range(60))
    )
    source = data.WithCanaries(data.Jsonl(str(text), validation=0.0), repeats=(60, 60, 60, 1, 1), digits=6)
    evaluation = evals.Exposure(source, candidates=64)
    stage = Stage(
        data=data.Pretrain(source, length=48, batch=16),
        objective=NextToken(),
        optimizer=optim.AdamW(learning_rate=1e-2),
        steps=120,
        evaluate_every=120,
        prompts=(),
        evaluations=(evaluation,),
    )
    model = TransformerConfig(vocab=261, layers=1, width=48, heads=2)
    Experiment(model=model, tokenizer=data.Bytes(), stages={"pretrain": stage}).run(tmp_path / "run")
    lm = load(tmp_path / "run")
    result = evaluation(lm)
    assert result.values["exposure_bits_60x"] > 4
    numbers = source.numbers(4, 64)
    own, *others = [float(lm.logprobs(f"{source.context(4)} {number}").sum()) for number in numbers]
    expected = math.log2(64 / (1 + sum(other > own for other in others)))
    assert result.items[4]["exposure_bits"] == pytest.approx(
        expected, abs=0.2
    )  # ranks of all but equal ones may differ


def test_exposure_is_that_of_the_rank(monkeypatch):
    """Ranks 1 and 3 of 8, and a model that tells none apart."""
    source = data.WithCanaries(data.PyDocs(), repeats=(1, 2, 2), digits=4)
    logprobs = [*(-1 - i for i in range(8)), -3, -1, -2, *[-9] * 5, *[-4] * 8]
    found = [likelihood.Likelihood(logprob, False, 4) for logprob in logprobs]
    monkeypatch.setattr(likelihood, "score", lambda *_, **__: found)
    model = types.SimpleNamespace(tokenizer=data.Bytes().build([]), config=None, params=None, rules=None)
    result = evals.Exposure(source, candidates=8)(model)
    assert [item["exposure_bits"] for item in result.items] == [3, math.log2(8 / 3), math.log2(8 / 4.5)]
    assert result.values["exposure_bits_1x"] == 3


def test_canaries_are_in_the_training_split_alone(tmp_path):
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(40)))
    plain = data.Jsonl(str(text), validation=0.3)
    source = data.WithCanaries(plain, repeats=(1, 3), digits=4)
    assert [*source.documents("validation")] == [*plain.documents("validation")]
    train = [*source.documents("train")]
    assert train[4:] == [*plain.documents("train")]
    assert train[:4] == [f"{source.context(i)} {source.numbers(i, 9)[0]}." for i in (0, 1, 1, 1)]
    with pytest.raises(UserError, match="digits: got 4, which has too few numbers for 6000"):
        evals.Exposure(source, candidates=6_000).check(data.Bytes().build([]))
