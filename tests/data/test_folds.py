"""Laws of folds: disjoint, exhaustive, by the hash that divides the source itself, and grouped by its key."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import gptjax
from gptjax import data, evals
from gptjax.config import from_json, to_json
from gptjax.data.folds import Fold, fold_of, with_fold
from gptjax.types import UserError

K = 4
OURS = str(Path(gptjax.__file__).parent / "data")
"""Python files whose documentation is small."""


def of(folds: list[Fold]) -> tuple[list[list], list[list]]:
    return [list(fold.documents("train")) for fold in folds], [list(fold.documents("validation")) for fold in folds]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "text").write_text("\n".join(f"line {i % 90}" for i in range(100)))
    rows = [{"text": f"a {i}", "label": i % 2} for i in range(60)]
    (folder / "labelled").write_text("\n".join(map(json.dumps, rows)))
    talks = [[{"role": "user", "content": f"hi {i // 3}"}, {"role": "assistant", "content": f"{i}"}] for i in range(90)]
    (folder / "talks").write_text("\n".join(map(json.dumps, talks)))
    return folder


def sources(files):
    yield data.Text(str(files / "text"), "\n")
    yield data.LabelledJsonl(str(files / "labelled"), (0, 1))
    yield data.ChatJsonl(str(files / "talks"))
    yield data.Conversations(data.Jsonl(str(files / "talks")), data.OpenAIMessages())
    yield data.PyDocsChat(str(files), OURS)


def test_folds_are_disjoint_and_exhaustive(files):
    for source in sources(files):
        everything = Counter(map(repr, (d for split in ("train", "validation") for d in source.documents(split))))
        trained, held_out = of([Fold(source, i, K) for i in range(K)])
        for train, validation in zip(trained, held_out, strict=True):
            assert Counter(map(repr, train)) + Counter(map(repr, validation)) == everything
            assert not set(map(repr, train)) & set(map(repr, validation))
        assert sum((Counter(map(repr, fold)) for fold in held_out), Counter()) == everything
        sizes = [len(fold) for fold in held_out]
        assert min(sizes) > 0
    assert len({Fold(source, i, K).fingerprint() for i in range(K)}) == K


def test_fold_0_of_10_is_a_validation_fraction_of_a_tenth(files):
    source = data.Text(str(files / "text"), "\n", validation=0.1)
    for split in ("train", "validation"):
        assert list(Fold(source, 0, 10).documents(split)) == list(source.documents(split))


def test_documents_with_one_key_stay_together(files):
    """Several answers to one first message; documentation and conversations about one name."""
    fold = Fold(data.ChatJsonl(str(files / "talks")), 1, K)
    asked = {split: {talk[0].text for talk in fold.documents(split)} for split in ("train", "validation")}
    assert not asked["train"] & asked["validation"]
    assert len(list(fold.documents("validation"))) == 3 * len(asked["validation"])
    assert fold.questions(2)[0][0] in asked["validation"]
    ours = data.PyDocs(str(files), OURS)
    assert {doc for _, doc in ours.keyed()} == {*ours.documents("train"), *ours.documents("validation")}
    assert {fold_of(f"{i}", K) for i in range(50)} == set(range(K))


def test_every_source_of_a_configuration_is_divided(files):
    text = data.Text(str(files / "text"), "\n")
    stages = {
        "a": data.Pretrain(data.Mix((text, text), (2.0, 1.0))),
        "b": (evals.BitsPerByte(text), evals.Answers(data.PyDocsChat())),
    }
    folded = with_fold(stages, 2, K)
    assert folded["a"].source.sources == (Fold(text, 2, K),) * 2
    assert [e.source for e in folded["b"]] == [Fold(text, 2, K), Fold(data.PyDocsChat(), 2, K)]
    assert from_json(json.loads(json.dumps(to_json(folded["a"])))) == folded["a"]


def test_what_cannot_be_divided_is_refused(files):
    tokens = data.Pretrain(data.Tokens("train.bin"))
    with pytest.raises(UserError, match=r"^a\.source: folds: got Tokens, whose documents no hash divides"):
        with_fold({"a": tokens}, 0, K)
    with pytest.raises(UserError, match=r"^source: folds: got HFDataset.* `validation` is a fraction"):
        with_fold(data.Pretrain(data.HFDataset("folder", validation="test")), 0, K)
    with pytest.raises(UserError, match=r"^folds: fold . of 4 of Text.* has no document for .*one file without"):
        [list(Fold(data.Text(str(files / "text")), i, K).documents("train")) for i in range(K)]
    with pytest.raises(UserError, match=r"^fold: got 4, must be from 0 to 3"):
        Fold(data.PyDocs(), K, K)
