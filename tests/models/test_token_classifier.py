"""Classifiers of tokens as experiments: names in texts, and the steps of solutions."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import gptjax
from gptjax import data, evals, optim
from gptjax.data.tags import step_ids, tagged_ids
from gptjax.evals.entities import entities
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import TokenClassifierConfig, TransformerConfig
from gptjax.objectives import TokenClassification
from gptjax.types import UserError

BYTES = data.Bytes().build(iter(()))
BACKBONE = TransformerConfig(vocab=BYTES.vocab, layers=1, width=32, heads=2)
CLASSES = ("O", "B-PER", "I-PER")


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def stage(read, **changes) -> Stage:
    adam = optim.AdamW(learning_rate=1e-2, schedule=optim.Constant(), weight_decay=0.0)
    return Stage(read, TokenClassification(), adam, **{"steps": 60, "evaluate_every": 1000, "prompts": (), **changes})


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O B-B", [("A", 1, 3), ("B", 4, 5)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("I-A I-A O I-B", [("A", 0, 2), ("B", 3, 4)]),  # as IOB1 has it
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("S-A B-B I-B E-B I-B", [("A", 0, 1), ("B", 1, 4), ("B", 4, 5)]),
        ("O O", []),
    ],
)
def test_entities_of_tags(tags, expected):
    assert entities(tags.split()) == expected


def test_labels_lie_at_the_first_token_of_a_word_and_at_the_end_of_a_step(tmp_path):
    source = data.TaggedJsonl(
        written(tmp_path / "a.jsonl", [{"tokens": ["Ada", "is"], "tags": ["B-PER", 0]}]), CLASSES, validation=0.0
    )
    batch = next(data.ClassifyTokens(source, length=12, batch=2).batches(BYTES, "train", 0, tmp_path))
    ids, firsts = tagged_ids(["Ada", "is"], BYTES)
    np.testing.assert_array_equal(batch.tokens[0][: len(ids)], ids)
    assert BYTES.decode(ids) == "Ada is"
    assert np.flatnonzero(batch.weights[0]).tolist() == firsts
    assert batch.targets[1][firsts].tolist() == [1, 0]
    rows = [{"prompt": "1+1?", "completions": ["a", "b"], "labels": [True, False]}]
    steps = data.StepsJsonl(written(tmp_path / "b.jsonl", rows), validation=0.0)
    batch = next(data.ClassifySteps(steps, length=12, batch=1).batches(BYTES, "train", 0, tmp_path))
    ids, lasts = step_ids("1+1?", ["a", "b"], BYTES, "\n")
    assert BYTES.decode(ids) == "1+1?a\nb\n"
    assert [ids[i] for i in lasts] == BYTES.encode("\n\n")
    assert np.flatnonzero(batch.weights[0]).tolist() == lasts
    assert batch.targets[0][lasts].tolist() == [1, 0]

    for row, line in (
        ({"tokens": ["a", "b"], "tags": ["O"]}, "got 2 and 1 in tokens and tags, must be two lists of one length"),
        ({"tokens": ["a"], "tags": ["X"]}, "tags: got 'X', must be one of O, B-PER, I-PER"),
        ({"tokens": ["a"], "tags": [3]}, "tags: got 3, must be one of"),
    ):
        bad = data.TaggedJsonl(written(tmp_path / "bad.jsonl", [row]), CLASSES, validation=0.0)
        with pytest.raises(UserError, match=rf"bad\.jsonl:1: {line}"):
            list(bad.documents("train"))
    rows[0]["labels"] = [0.5, 1]
    with pytest.raises(UserError, match=r"bad\.jsonl:1: labels: got 0\.5, must be true or false"):
        list(data.StepsJsonl(written(tmp_path / "bad.jsonl", rows), validation=0.0).documents("train"))


@pytest.mark.alone
def test_names_are_found(tmp_path, monkeypatch):
    """The word after Mr is a name."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    rng, rows = np.random.default_rng(0), []
    for _ in range(200):
        words = [*rng.choice(["ab", "cd", "ef"], 5)]
        at, tags = rng.integers(4), ["O"] * 5
        words[at], tags[at + 1] = "Mr", "B-PER"
        rows.append({"tokens": list(map(str, words)), "tags": tags})
    source = data.TaggedJsonl(written(tmp_path / "names.jsonl", rows), CLASSES)
    read = data.ClassifyTokens(source, length=32, batch=32)
    experiment = Experiment(
        TokenClassifierConfig(BACKBONE, classes=3),
        data.Bytes(),
        {"tag": stage(read, evaluations=(evals.Entities(source),))},
    )
    experiment.run(tmp_path / "run")
    values = json.loads((tmp_path / "run" / "report" / "tag.json").read_text())["results"][0]["values"]
    assert values["f1"] == values["accuracy"] == 1
    tagger = gptjax.load(tmp_path / "run", kind=gptjax.Model)
    assert isinstance(tagger, gptjax.TokenClassifierModel)
    texts = [["ab", "Mr", "cd", "ef"], ["Mr", "ab"]]
    found = tagger.classify(texts)
    assert found == [["O", "O", "B-PER", "O"], ["O", "B-PER"]]
    tagger.save(tmp_path / "saved")
    assert gptjax.load(tmp_path / "saved", kind=gptjax.TokenClassifierModel).classify(texts) == found
    with pytest.raises(UserError, match=r"model\.classes: got 3, must be 2 to score steps"):
        tagger.step_scores("a", ["b"])
    tagger.save_hf(tmp_path / "hf")
    again = gptjax.load(tmp_path / "hf", kind=gptjax.TokenClassifierModel)
    assert again.classify(texts) == found
    assert again.labels == CLASSES
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        import torch
        import transformers

        theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "hf")
        ids = tagged_ids(texts[0], tagger.tokenizer)[0]
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        ours = tagger.config.build().apply({"params": tagger.params}, np.array([ids]))[0][0]
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.alone
def test_steps_are_scored(tmp_path, monkeypatch):
    """A step is right while no x has come."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        steps = [str(step) for step in rng.choice(["a", "b", "x"], 3, p=[0.4, 0.4, 0.2])]
        labels = [all(step != "x" for step in steps[: k + 1]) for k in range(3)]
        rows.append({"prompt": f"{i}?", "completions": steps, "labels": labels})
    source = data.StepsJsonl(written(tmp_path / "steps.jsonl", rows))
    read = data.ClassifySteps(source, length=32, batch=32, step_separator="|")
    model = TokenClassifierConfig(BACKBONE, classes=2)
    Experiment(model, data.Bytes(), {"steps": stage(read, steps=100)}).run(tmp_path / "run")
    judge = gptjax.load(tmp_path / "run", kind=gptjax.TokenClassifierModel)
    assert judge.step_separator == "|"
    scores = judge.step_scores("7?", ["a", "x", "b"])
    assert scores[0] > 0.8
    assert (scores[1:] < 0.2).all()
    with pytest.raises(UserError, match=r"x\.model\.classes: got 3, must be 2 for steps|classes: got 3, must be 2"):
        Experiment(TokenClassifierConfig(BACKBONE, classes=3), data.Bytes(), {"x": stage(read)})
