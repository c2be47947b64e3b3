"""Accuracies of pairs are those of likelihoods computed one text at a time, with pairs of one conversation as a
cluster."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax import data, evals
from gptjax.data import Message, PlainText
from gptjax.evals import intervals
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.types import UserError

BYTES = data.Bytes().build(iter(())).with_specials(data.CHAT_SPECIALS)
CONFIG = TransformerConfig(vocab=BYTES.vocab, layers=1, width=16, heads=2)


@pytest.fixture(scope="module")
def model():
    params = jax.jit(CONFIG.build().init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return LanguageModel(CONFIG, jax.tree.map(lambda x: x * 4, params), BYTES, context=64)


def source(tmp_path, n=24):
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abc "), draw.integers(1, 12))) + "." for _ in range(2 * n)]
    rows = [{"prompt": f"q{i // 2}", "chosen": words[2 * i], "rejected": words[2 * i + 1]} for i in range(n)]
    rows.append({"prompt": "q", "chosen": "x" * 80, "rejected": "y"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data.PreferencesJsonl(str(tmp_path / "pairs.jsonl"), validation=0.0)


@pytest.mark.parametrize("template", [None, PlainText("Q: ", " A: ", append_eos=True)], ids=["markers", "text"])
def test_accuracies_are_those_of_likelihoods(template, model, tmp_path):
    evaluation = evals.PreferenceAccuracy(source(tmp_path), "train", template=template)
    values, sums, means, shorter = evaluation(model), [], [], []
    pairs = list(evaluation.source.documents("train"))[:-1]
    for pair in pairs:
        found = []
        for reply in (pair.chosen, pair.rejected):
            if template is None:
                ids, n = data.chat.render((*pair.prompt, reply), BYTES)[0], len(reply.text) + 1
            else:
                text = f"Q: {pair.prompt[0].text} A: {reply.text}"
                ids, n = [BYTES.bos, *BYTES.encode(text), BYTES.eos], len(reply.text) + 1
            logprob = float(model.logprobs(ids)[-n:].sum())
            found.append((logprob, logprob / n, -len(reply.text)))
        for wins, (chosen, rejected) in zip((sums, means, shorter), zip(*found, strict=True), strict=True):
            wins.append(0.5 if chosen == rejected else float(chosen > rejected))
    clusters = [pair.prompt[0].text for pair in pairs]
    expected = intervals.mean(sums, clusters)
    names = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_per_token", "shorter")
    np.testing.assert_allclose(
        [values.values[name] for name in names],
        [expected.mean, expected.low, expected.high, np.mean(means), np.mean(shorter)],
    )
    gap = intervals.difference(sums, shorter, clusters)
    assert values.values["accuracy_over_shorter_p"] == pytest.approx(gap.p)
    assert values.values["left_out"] == 1
    assert [item["outcome"] for item in values.items] == sums
    assert len({item["cluster"] for item in values.items}) == 12


def test_pairs_that_do_not_fit_are_an_error(model, tmp_path):
    with pytest.raises(UserError, match="length: got 3, must be more: no pair"):
        evals.PreferenceAccuracy(source(tmp_path), "train", length=3)(model)


def test_plain_text_is_encoded_as_one_and_weighs_replies():
    tokenizer = data.TrainSentencePiece(vocab=300).build(iter(["Human: that, Assistant: what?", "and this"] * 20))
    said = (("user", "what?"), ("assistant", "that,"), ("user", "and"), ("assistant", "this"))
    talk = tuple(Message(role, text) for role, text in said)
    template = PlainText("\n\nHuman: ", "\n\nAssistant: ", append_eos=True)
    text = "\n\nHuman: what?\n\nAssistant: that,\n\nHuman: and\n\nAssistant: this"
    earlier = tuple(dataclasses.replace(m, weight=0.0) for m in talk[:-1])
    for said, expected in ((talk, "that, this"), ((*earlier, talk[-1]), "this")):
        ids, weights = template.render(said, tokenizer)
        assert ids == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        taught = [i for i, weight in zip(ids, weights, strict=True) if weight]
        assert " ".join(tokenizer.decode(taught).split()) == expected
        assert weights[-1] == 1.0
    start = template.prompt(talk[:3], tokenizer)
    assert start == ids[: len(start)]
    with pytest.raises(UserError, match="PlainText has none"):
        template.render((Message("tool", "4"),), tokenizer)
    with pytest.raises(UserError, match="PlainText has none"):
        template.results((Message("tool", "4"),), tokenizer)
