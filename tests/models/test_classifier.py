"""Classifiers as experiments: from a file of labelled texts, over a pretrained backbone, to a `ClassifierModel`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

import gptjax
from gptjax import data, evals, optim
from gptjax.cli.main import main
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import ClassifierConfig, EncoderConfig, Last, Mean, TransformerConfig
from gptjax.objectives import Classification, MaskedTokens, NextToken
from gptjax.types import Labelled, UserError

BYTES = data.Bytes().build(iter(()))
LENGTH = 16


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> data.LabelledJsonl:
    """Texts of random letters, "good" where there is an x in it."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(200):
        text = "".join(rng.choice(list("abcdefg"), rng.integers(2, 12)))
        good = rng.random() < 0.5
        at = rng.integers(len(text))
        lines.append(json.dumps({"text": text[:at] + "x" * good + text[at:], "label": "good" if good else "bad"}))
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    path.write_text("\n".join(lines))
    return data.LabelledJsonl(str(path), classes=("bad", "good"))


def test_batches_hold_a_text_a_row_with_its_label(reviews, tmp_path):
    read = data.Classify(reviews, length=LENGTH, batch=8)
    examples = list(reviews.documents("validation"))
    rows = read.evaluation(BYTES, "validation", tmp_path)
    batches = list(rows)
    assert all(isinstance(batch, Labelled) for batch in batches)
    tokens, segments, labels = (
        np.concatenate([getattr(b, n) for b in batches]) for n in ("tokens", "segments", "labels")
    )
    for row, example in enumerate(examples):
        ids = [*([BYTES.bos] if BYTES.bos is not None else []), *BYTES.encode(example.text), BYTES.eos][:LENGTH]
        np.testing.assert_array_equal(tokens[row][segments[row] == 1], ids)
        assert labels[row] == [("x" in example.text) * 1]
    assert (labels[len(examples) :] == -1).all()
    assert (segments[len(examples) :] == 0).all()

    found = [next(batches) for batches in [read.batches(BYTES, "train", 0, tmp_path)] for _ in range(40)]
    for batch in found:  # shuffled, over more than an epoch
        np.testing.assert_array_equal((batch.tokens == BYTES.encode("x")[0]).any(1), batch.labels[:, 0] == 1)


def test_a_text_longer_than_a_row_is_cut(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "abcdefgh", "label": 1}\n{"text": "b", "label": 0}')
    read = data.Classify(
        data.LabelledJsonl(str(path), classes=(0, 1), validation=0.0), length=4, batch=2, shuffle=False
    )
    batch = next(read.batches(BYTES, "train", 0, tmp_path))
    assert batch.labels.tolist() == [[1], [0]]
    assert batch.segments[0].tolist() == [1] * 4
    with pytest.raises(UserError, match=r"source: got Jsonl\(.*whose documents are str, must be Example"):
        data.Classify(data.Jsonl(str(path), validation=0.0), length=4, batch=2).batches(BYTES, "train", 0, tmp_path)
    with pytest.raises(UserError, match=r"long.jsonl:1: got the label 1, must be one of 0, 'a'"):
        list(data.LabelledJsonl(str(path), classes=(0, "a")).documents("train"))


COMMON = {"vocab": BYTES.vocab, "layers": 1, "width": 32, "heads": 2}
KINDS = {
    "decoder": (TransformerConfig(**COMMON), NextToken(), Last()),
    "encoder": (EncoderConfig(**COMMON), MaskedTokens(mask_token=0, vocab=BYTES.vocab), Mean()),
}


def stage(data, objective, **changes) -> Stage:
    adam = optim.AdamW(learning_rate=1e-2, schedule=optim.Constant(), weight_decay=0.0)
    return Stage(data, objective, adam, **{"steps": 2, "evaluate_every": 1000, "prompts": (), **changes})


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_backbone_is_fine_tuned(kind, reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    backbone, objective, pooling = KINDS[kind]
    before = Experiment(
        backbone, data.Bytes(), {"pretrain": stage(data.Pretrain(data.Jsonl(reviews.path), LENGTH, 8), objective)}
    )
    before.run(tmp_path / "before")
    read = data.Classify(reviews, LENGTH, 32)
    accuracy = evals.Accuracy(reviews, length=LENGTH)
    steps = {"classify": stage(read, Classification(), steps=60, evaluations=(accuracy,))}
    config = ClassifierConfig(dataclasses.replace(backbone, dropout=0.0), classes=2, pooling=pooling)
    after = Experiment(config, data.Bytes(), steps, init_from=str(tmp_path / "before"))
    other = dataclasses.replace(config, backbone=dataclasses.replace(backbone, layers=2))
    with pytest.raises(UserError, match=r"model: differs from the pretrained model .*before.*: layers: 1 → 2"):
        dataclasses.replace(after, model=other).run(tmp_path / "other")
    capsys.readouterr()
    after.run(tmp_path / "after")
    assert "gptjax chat" not in capsys.readouterr().out

    lines = [json.loads(line) for line in (tmp_path / "after" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_accuracy"] for line in lines if "validation_accuracy" in line][-1] == 1
    found = json.loads((tmp_path / "after" / "report" / "classify.json").read_text())
    assert found["results"][0]["values"]["accuracy"] == 1
    assert "nats a text at the end" in (tmp_path / "after" / "report" / "report.md").read_text()

    judge = gptjax.load(tmp_path / "after", kind=gptjax.ClassifierModel)
    texts = ["abcd", "abxd", "xa", "gg"]
    likely = judge.classify(texts, batch=3)
    np.testing.assert_allclose(likely.sum(-1), 1, rtol=1e-6)
    assert likely.argmax(-1).tolist() == [0, 1, 1, 0]
    assert judge.labels == ("bad", "good")
    judge.save(tmp_path / "saved")
    again = gptjax.load(tmp_path / "saved", kind=gptjax.ClassifierModel)
    np.testing.assert_array_equal(again.classify(texts, batch=3), likely)
    assert (again.labels, again.append_eos) == (judge.labels, True)
    with pytest.raises(UserError, match="kind: got LanguageModel, must be ClassifierModel"):
        gptjax.load(tmp_path / "after")
    if kind == "encoder":
        with pytest.raises(UserError, match="no published family can express it"):
            judge.save_hf(tmp_path / "hf")
        return
    assert main(["convert", str(tmp_path / "after"), str(tmp_path / "hf")]) == 0
    again = gptjax.load(tmp_path / "hf", kind=gptjax.ClassifierModel)
    np.testing.assert_array_equal(again.classify(texts, batch=3), likely)
    assert (again.labels, again.append_eos) == (judge.labels, True)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        import transformers

        pipe = transformers.pipeline("text-classification", str(tmp_path / "hf"), batch_size=4)
        found = pipe(texts)
        assert [each["label"] for each in found] == ["bad", "good", "good", "bad"]
        np.testing.assert_allclose([each["score"] for each in found], likely.max(-1), rtol=1e-5)


def test_what_does_not_go_together_is_refused(reviews):
    backbone, objective, _ = KINDS["decoder"]
    texts, labelled = stage(data.Pretrain(reviews), objective), stage(data.Classify(reviews), Classification())
    mixed = stage(data.Pretrain(reviews), Classification())
    for model, read, line in (
        (backbone, labelled, "x.objective: got Classification, which trains classifier models, must train decoder"),
        (ClassifierConfig(backbone, 2), texts, "x.objective: got NextToken, which trains decoder .* train classifier"),
        (ClassifierConfig(backbone, 2), mixed, "x.data: got Pretrain, which makes Batch batches, must make Labelled"),
        (ClassifierConfig(backbone, 3), labelled, "x.data.source.classes: got 2, must be 3, as many as model.classes"),
    ):
        with pytest.raises(UserError, match=line):
            Experiment(model, data.Bytes(), {"x": read})
    with pytest.raises(UserError, match=r"model\.classes: got 1, must be at least 2"):
        ClassifierConfig(backbone, 1)
