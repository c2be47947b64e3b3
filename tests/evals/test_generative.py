"""Laws of generative evaluation: replies are the model's own, resumed is uninterrupted, each end is counted apart."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import jax
import pytest

from gptjax.data import Bytes, Message
from gptjax.evals import Generative, intervals
from gptjax.evals.generative import pass_at
from gptjax.inference import Sampling
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.tasks import FewShot, Generation, Reply, Score, Task
from gptjax.tasks.task import unanswered
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Echo(Task):
    """Numbers to repeat; pairs of items share a cluster. An odd length of the reply counts as right too."""

    count: int = 6

    def __len__(self):
        return self.count

    def example(self, i):
        return Message("user", f"say {i * 7}" + "!" * (90 if i == 5 else 0)), Message("assistant", str(i * 7))

    def score(self, i, reply):
        if not reply.text:
            return unanswered(reply)
        return Score(float(reply.text == str(i * 7) or len(reply.text) % 2), parts={"length": len(reply.text)})

    def cluster(self, i):
        return str(i // 2)

    @property
    def generation(self):
        return Generation(max_tokens=12)


@dataclasses.dataclass(frozen=True)
class Wrong(Echo):
    """A task that does not take its own right replies."""

    def score(self, i, reply):
        return Score(0.0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    tokenizer = Bytes().build([])
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jax.numpy.zeros((1, 2), int))["params"]
    return LanguageModel(config, params, tokenizer, context=96)


@pytest.fixture(scope="module")
def sampled(lm):
    return Generative(Echo(), samples=3, sampling=Sampling(), seed=4, rows=4)(lm)


def test_replies_are_the_models_own(lm):
    result = Generative(Echo(), items=5, rows=3)(lm)
    for item in result.items:
        reply = lm.chat(Echo().prompt(item["item"]), max_tokens=12, temperature=0)
        assert item["reply"] == reply.content
        assert item["outcome"] == Echo().score(item["item"], Reply(reply.content)).outcome


def test_figures_are_those_of_the_items(sampled):
    """Mean, interval and pass@k are computed anew from the items; every reply ended in one way."""
    values, items = sampled.values, sampled.items
    assert [(item["item"], item["sample"]) for item in items] == [*itertools.product(range(6), range(3))]
    found = intervals.mean([item["outcome"] for item in items], [item["item"] // 2 for item in items])
    assert (values["accuracy"], values["accuracy_low"], values["clusters"]) == (found.mean, found.low, 3)
    ends = ("right", "partly_right", "wrong", "not_found", "cut_off", "too_long", "timed_out", "failed")
    assert sum(values[end] for end in ends) == values["replies"] == 18
    assert values["too_long"] == 3
    right = [sum(item["outcome"] for item in items if item["item"] == i) for i in range(6)]
    for k in (1, 2, 3):
        draws = [itertools.combinations([True] * int(r) + [False] * int(3 - r), k) for r in right]
        expected = sum(any(draw) for each in draws for draw in each) / math.comb(3, k) / 6
        assert values[f"pass@{k}"] == pytest.approx(expected)
    assert len({item["reply"] for item in items if item["item"] == 0}) > 1
    assert pass_at(5, 0, 5) == 0
    assert pass_at(5, 1, 5) == 1


def test_an_interrupted_evaluation_is_resumed(lm, sampled, tmp_path):
    evaluation = Generative(Echo(), samples=3, sampling=Sampling(), seed=4, rows=4)
    path = tmp_path / "echo.jsonl"

    def interrupt(done, total, mean):
        assert total == 18
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.run(lm, path, interrupt, of="a")
    assert len(path.read_text().splitlines()) == 8
    with path.open("a") as file:
        file.write('{"item": 1, "sa')  # killed while it wrote
    counts = []
    assert evaluation.run(lm, path, lambda done, *_: counts.append(done), of="a") == sampled
    assert counts == list(range(8, 19))
    assert len({(row["item"], row["sample"]) for row in map(json.loads, path.read_text().splitlines()[1:])}) == 18
    with pytest.raises(UserError, match="choose another folder"):
        evaluation.run(lm, path, of="another model")
    with pytest.raises(UserError, match="choose another folder"):
        dataclasses.replace(evaluation, seed=5).run(lm, path, of="a")


def test_the_signature_names_all_that_changes_replies_or_scores(lm):
    def signature(evaluation, form="chat"):
        from gptjax.evals.replies import prompts

        return evaluation.signature(form, prompts(lm, evaluation.task, evaluation._chosen(), form))

    base = Generative(Echo(5))
    others = [
        Generative(Echo(4)),
        Generative(FewShot(Echo(5), 1)),
        Generative(FewShot(Echo(5), 1, seed=1)),
        Generative(Echo(5), items=3),
        Generative(Echo(5), max_tokens=4),
        Generative(Echo(5), sampling=Sampling(top_k=3)),
        Generative(Echo(5), seed=1),
    ]
    found = [signature(base), signature(base, "text"), *map(signature, others)]
    assert len({*found}) == len(found)
    assert signature(Generative(Echo(5), rows=2, workers=1)) == found[0]
    assert "task:Echo|version:1|" in found[0]


def test_what_cannot_be_scored_is_said_before_the_first_step(lm):
    with pytest.raises(UserError, match="task: Wrong gives its own right reply to item 0, '0', 0, scored; must be 1"):
        Generative(Wrong()).check(lm.tokenizer)
    with pytest.raises(UserError, match="task: Echo has no items"):
        Generative(Echo(0)).check(lm.tokenizer)
    with pytest.raises(UserError, match="samples: got 2 at temperature 0"):
        Generative(Echo(), samples=2)
    with pytest.raises(UserError, match="rows: got 0, must be at least 1"):
        Generative(Echo(), rows=0)
    letters = type("Few", (), {"specials": {}, "encode": lambda _, text: [ord(c) for c in text if c in "say"]})
    letters.decode = lambda _, ids: "".join(map(chr, ids))
    with pytest.raises(UserError, match="the tokenizer cannot write the prompt of item 0"):
        Generative(Echo()).check(letters())
