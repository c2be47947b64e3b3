"""Pairs of replies: both are whole, prompts are cut from the left, and what cannot be compared is left out aloud."""

import json
import logging

import numpy as np
import pytest

from gptjax import data
from gptjax.types import PreferencePairs, UserError

BYTES = data.Bytes().build(iter(())).with_specials(data.CHAT_SPECIALS)
HUMAN = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {}\n\nAssistant: {}"


def written(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return data.PreferencesJsonl(str(path), validation=0.0)


def said(*turns):
    return [{"role": role, "content": text} for role, text in turns]


FORMS = [
    {"prompt": "How?", "chosen": "So.", "rejected": "No."},
    {"prompt": said(("user", "How?")), "chosen": said(("assistant", "So.")), "rejected": said(("assistant", "No."))},
    {
        "chosen": said(("user", "How?"), ("assistant", "So.")),
        "rejected": said(("user", "How?"), ("assistant", "No.")),
    },
    {"chosen": "\n\nHuman: How?\n\nAssistant: So.", "rejected": "\n\nHuman: How?\n\nAssistant: No."},
]


@pytest.mark.parametrize("row", FORMS)
def test_all_forms_are_the_same_pair(row, tmp_path):
    (pair,) = written(tmp_path, row).documents("train")
    assert [message.text for message in (*pair.prompt, pair.chosen, pair.rejected)] == ["How?", "So.", "No."]


def test_what_cannot_be_compared_is_left_out_and_counted(tmp_path, caplog):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    source = written(
        tmp_path,
        good,
        good | {"rejected": "b"},
        good | {"chosen": " "},
        {"chosen": HUMAN.format("a", "b"), "rejected": HUMAN.format("x", "c")},
    )
    with caplog.at_level(logging.WARNING):
        assert len(list(source.documents("train"))) == 1
    for reason in ("1 pairs with equal replies", "1 pairs with an empty reply", "1 pairs with different prompts"):
        assert reason in caplog.text
    nothing = written(tmp_path, good | {"rejected": "b"}, good | {"rejected": "b"}, good | {"chosen": ""})
    with pytest.raises(
        UserError, match=r"^path: got .*, all of whose pairs are left out: 2 with equal replies, 1 with an"
    ):
        next(nothing.documents("validation"))


@pytest.mark.parametrize(
    "row",
    [{"chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": 3, "rejected": 4}],
)
def test_a_bad_line_is_named(row, tmp_path):
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: "):
        list(written(tmp_path, row).documents("train"))


def test_conversations_that_begin_alike_are_in_one_split(tmp_path):
    rows = [{"prompt": f"q{i % 20}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(200)]
    written(tmp_path, *rows)
    source = data.PreferencesJsonl(str(tmp_path / "pairs.jsonl"), validation=0.3)
    train, held_out = ({pair.prompt[0].text for pair in source.documents(split)} for split in ("train", "validation"))
    assert train
    assert held_out
    assert not train & held_out
    folds = [data.Fold(source, i, 3) for i in range(3)]
    parts = [{pair.prompt[0].text for pair in fold.documents("validation")} for fold in folds]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20


def test_a_sequence_has_both_conversations_and_replies_are_the_targets(tmp_path):
    rows = [
        {"chosen": HUMAN.format(f"question {i}", "x" * i), "rejected": HUMAN.format(f"question {i}", "no")}
        for i in range(3, 8)
    ]
    read = data.Preferences(written(tmp_path, *rows), length=160, batch=2)
    found = []
    for batch in read.evaluation(BYTES, "train", tmp_path):
        assert isinstance(batch, PreferencePairs)
        for row in range(2):
            for number in (1, 2):
                mine = batch.segments[row] == number
                if not mine.any():
                    continue
                np.testing.assert_array_equal(batch.positions[row, mine], np.arange(mine.sum()))
                weights, targets = batch.weights[row, mine], batch.targets[row, mine]
                reply = BYTES.decode(targets[weights > 0][:-1])
                assert targets[weights > 0][-1] == BYTES.specials["<|end|>"]
                assert set(reply) <= set("xno")
                found.append((number, reply))
                assert "Yes?" in BYTES.decode(batch.tokens[row, mine]), "earlier replies are context"
    assert sorted(found) == sorted([(1, "x" * i) for i in range(3, 8)] + [(2, "no")] * 5)


def test_prompts_are_cut_from_the_left_and_replies_never(tmp_path):
    long = HUMAN.format("the last question", "{}")
    row = {"chosen": long.format("x" * 20), "rejected": long.format("y" * 20)}
    whole = data.Preferences(written(tmp_path, row), length=400, batch=1)
    (batch,) = whole.evaluation(BYTES, "train", tmp_path)
    size = int((batch.segments > 0).sum())
    (cut,) = data.Preferences(whole.source, length=size - 1, batch=1).evaluation(BYTES, "train", tmp_path)
    text = BYTES.decode(cut.tokens[0])
    assert "Yes?" not in text
    assert text.count("the last question") == 2
    assert cut.weights.sum() == batch.weights.sum() == 42
    with pytest.raises(UserError, match=r"no document|no pair|too long"):
        list(data.Preferences(whole.source, length=60, batch=1).evaluation(BYTES, "train", tmp_path))
