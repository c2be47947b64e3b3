"""Multiple choice against likelihoods of one text at a time, in numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax import data, evals
from gptjax.models.language_model import LanguageModel
from gptjax.nn import LearnedPositions, TransformerConfig
from gptjax.tasks import Choices, ChoiceTask
from gptjax.types import UserError

TOKENIZER = data.TrainCharacters().build(iter(["abcdefghijklmnopqrstuvwxyz é?:.\n"]))
CONFIG = TransformerConfig(vocab=64, layers=1, width=16, heads=2, positions=LearnedPositions(96))
NAMES = ("accuracy", "accuracy_per_character", "accuracy_per_byte", "accuracy_per_token")


@dataclasses.dataclass(frozen=True)
class Words(ChoiceTask):
    """Items with words of several lengths to choose from, two of each passage."""

    normalisation: str = "byte"
    count: int = 12

    def __len__(self):
        return self.count

    def example(self, i):
        return data.Message("user", "x"), data.Message("assistant", "y")

    def score(self, i, reply):
        raise NotImplementedError

    def cluster(self, i):
        return f"passage {i // 2}"

    def choices(self, i):
        context = f"which word follows a {'bc' * (i // 2)}? answer: "
        options = ("é", "dog", "elephants", "é é é é")[: 2 + i % 3]
        return Choices(tuple((context, option) for option in options), i % 2, "answer:")


@pytest.fixture(scope="module")
def model():
    shapes = jax.eval_shape(CONFIG.build().init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    return LanguageModel(CONFIG, params, TOKENIZER)


def logprob(model, context: str, option: str) -> float:
    """The spaces that end a context belong to the option."""
    return float(model.logprobs(context + option)[len(TOKENIZER.encode(context.rstrip())) :].sum())


@pytest.mark.parametrize("shots", [0, 1])
def test_figures_are_those_of_each_options_likelihood(model, shots):
    task = Words()
    evaluation = evals.MultipleChoice(task, shots=shots)
    evaluation.check(TOKENIZER)
    result = evaluation(model)
    right = {name: [] for name in (*NAMES, "accuracy_by_mutual_information")}
    for i in range(len(task)):
        item = task.choices(i)
        texts = [option for _, option in item.options]
        before = evaluation._before(i)
        assert item.options[0][0] not in before, "an item is no example for itself, nor for its passage"
        values = np.array([logprob(model, before + context, option) for context, option in item.options])
        np.testing.assert_allclose(result.items[i]["logprobs"], values, rtol=1e-4)
        untold = np.array([logprob(model, item.unconditional, option) for option in texts])
        scores = (
            values,
            values / [len(text) for text in texts],
            values / [len(text.encode()) for text in texts],
            values / result.items[i]["tokens"],
            values - untold,
        )
        for name, each in zip(right, scores, strict=True):
            right[name].append(each.argmax() == item.answer)
    for name, each in right.items():
        assert result.values[name] == pytest.approx(np.mean(each)), name
    assert [item["outcome"] for item in result.items] == right["accuracy_per_byte"]
    assert result.values["chance"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4]))
    low, high = result.values["accuracy_low"], result.values["accuracy_high"]
    assert low < result.values["accuracy"] < high
    assert "in 6 clusters" in result.markdown
    assert "**accuracy_per_byte**" in result.markdown


def test_signatures_differ_with_what_is_asked(model):
    first, second = (
        evals.MultipleChoice(Words(), items=2, shots=shots, mutual_information=False)(model) for shots in (0, 1)
    )
    assert "accuracy_by_mutual_information" not in first.values
    signatures = [result.markdown.splitlines()[-1] for result in (first, second)]
    assert signatures[0] != signatures[1]
    assert "shots:1" in signatures[1]


def test_long_contexts_are_cut_and_counted(model):
    short = dataclasses.replace(model, context=24)
    result = evals.MultipleChoice(Words(), items=4, mutual_information=False)(short)
    assert result.values["cut_contexts"] > 0
    item = Words().choices(0)
    whole = TOKENIZER.encode("".join(item.options[1]))
    kept = whole[-(24 + 1) :]
    assert result.items[0]["logprobs"][1] == pytest.approx(float(model.logprobs(kept)[-4:].sum()), rel=1e-4)
    with pytest.raises(UserError, match=r"^continuation: got 10 tokens, must be at most 8"):
        evals.MultipleChoice(Words())(dataclasses.replace(model, context=8))


def test_what_is_no_task_with_options():
    with pytest.raises(UserError, match=r"^mutual_information: got False"):
        evals.MultipleChoice(Words("mutual information"), mutual_information=False)
    with pytest.raises(UserError, match=r"^shots: got -1"):
        evals.MultipleChoice(Words(), shots=-1)
    with pytest.raises(UserError, match="has no items"):
        evals.MultipleChoice(Words(count=0)).check(TOKENIZER)
