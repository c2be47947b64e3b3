"""An encoder-decoder as an experiment: trained on pairs, sampled, evaluated, loaded."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest

import gptjax
from gptjax import data, evals, optim, tasks
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.inference import Sampling
from gptjax.nn import EncoderConfig, EncoderDecoderConfig, MultiHeadAttention, T5Bias, TransformerConfig
from gptjax.objectives import NextToken, SequenceToSequence
from gptjax.types import UserError

SIZES = {"vocab": 264, "layers": 1, "width": 32, "heads": 2, "positions": T5Bias()}
MODEL = EncoderDecoderConfig(EncoderConfig(**SIZES), TransformerConfig(**SIZES, cross_attention=MultiHeadAttention()))


@dataclasses.dataclass(frozen=True)
class Copies:
    """A letter, to be written twice; the same on both sides."""

    def documents(self, split):
        for letter in "abcdefgh":
            yield data.TextPair(letter, letter * 2)

    def fingerprint(self):
        return "copies"


@dataclasses.dataclass(frozen=True)
class Twice(tasks.Task):
    """The same as a task."""

    def __len__(self):
        return 8

    def example(self, i):
        letter = "abcdefgh"[i]
        return data.Message("user", letter), data.Message("assistant", letter * 2)

    def text(self, i):
        return "abcdefgh"[i]

    def score(self, i, reply):
        return tasks.Score(float(reply.text == "abcdefgh"[i] * 2))


STAGE = Stage(
    data=data.Pairs(Copies(), length=12, batch=8),
    objective=SequenceToSequence(),
    optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Constant()),
    steps=60,
    evaluate_every=60,
    eval_sequences=8,
    prompts=("a",),
    evaluations=(evals.ExactMatch(Copies(), max_tokens=4), evals.Generative(Twice(), max_tokens=4, rows=3)),
)


@pytest.mark.alone
def test_an_encoder_decoder_trains_from_an_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    Experiment(MODEL, data.Bytes(), {"train": STAGE}).run(folder)
    out = capsys.readouterr().out
    assert f"Now try:\n  python -i -c 'import gptjax; model = gptjax.load(\"{folder}\", kind=gptjax.TextToText)'" in out
    found, scored = json.loads((folder / "report" / "train.json").read_text())["results"]
    assert found["values"] == {"exact_match": 1.0, "documents": 8}
    assert (scored["values"]["accuracy"], scored["values"]["right"]) == (1.0, 8)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines if "sample" in line][-1].startswith("a\n")

    t5 = gptjax.load(folder, kind=gptjax.TextToText)
    assert [c.text for c in t5.generate(["c", "h"], temperature=0)] == ["cc", "hh"]
    t5.save(tmp_path / "saved")
    again = gptjax.load(tmp_path / "saved", kind=gptjax.TextToText)
    assert again.generate("d", temperature=0)[0].text == "dd"
    with pytest.raises(UserError, match="for an encoder-decoder, must be 0"):
        evals.Generative(Twice(), sampling=Sampling())(again)


def test_pairs_and_models_that_do_not_go_together_are_refused():
    texts = dataclasses.replace(STAGE, data=data.Pretrain(data.PyDocs(), 12, 8))
    for model, stage, message in (
        (TransformerConfig(**SIZES), STAGE, "x.objective: got SequenceToSequence, .* must train decoder models"),
        (MODEL, dataclasses.replace(STAGE, objective=NextToken()), "x.objective: got NextToken, which trains decoder"),
        (MODEL, texts, "x.data: got Pretrain, which makes Batch batches, must make Pair for SequenceToSequence"),
    ):
        with pytest.raises(UserError, match=message):
            Experiment(model, data.Bytes(), {"x": stage})


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "null"),
        (101, "einhunderteins"),
        (16, "sechzehn"),
        (42, "zweiundvierzig"),
        (1_000, "eintausend"),
        (21_101, "einundzwanzigtausendeinhunderteins"),
        (70_717, "siebzigtausendsiebenhundertsiebzehn"),
    ],
)
def test_numbers_are_spelled_in_german(n, words):
    assert importlib.import_module("experiments.t5_numbers").german(n) == words
