"""Laws of the best of n: its distribution, its divergence, and the estimate from a few samples."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generative import Echo

from gptjax.data import Bytes, Message
from gptjax.evals import Generative
from gptjax.evals.best_of import best_of, choose, expected_outcome, kl_bound
from gptjax.inference import Sampling
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.protocols import Reward
from gptjax.types import UserError

VOCAB, LENGTH = 4, 3


@dataclasses.dataclass(frozen=True)
class Longest(Reward):
    """The longest reply."""

    def __call__(self, conversations):
        return [float(len(messages[-1].text)) for messages in conversations]

    def fingerprint(self):
        return "longest"


@pytest.fixture(scope="module")
def replies() -> np.ndarray:
    """Probabilities of all 64 replies of three tokens of a small model to its first token: float64 [64]."""
    model = TransformerConfig(vocab=VOCAB, layers=1, width=8, heads=1).build()
    every = np.array([(0, *ids) for ids in itertools.product(range(VOCAB), repeat=LENGTH)])

    @jax.jit
    def logprobs(key):
        params = model.init(key, jnp.zeros((1, 2), int))["params"]
        logits, _ = model.apply({"params": params}, every[:, :-1])
        found = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(found, every[:, 1:, None], -1).sum((1, 2))

    found = np.exp(np.asarray(logprobs(jax.random.key(0)), np.float64))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    return found / found.sum()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("levels", [64, 3], ids=["different rewards", "three levels"])
def test_the_divergence_of_the_best_of_n_is_within_its_bound(replies, n, levels):
    """All n-tuples of replies are enumerated. Different rewards nearly reach the bound, and ties stay below it."""
    rewards = np.random.default_rng(0).permutation(64) % levels
    tuples = np.array([*itertools.product(range(64), repeat=n)])
    chosen = np.take_along_axis(tuples, choose(rewards[tuples])[:, None], 1)[:, 0]
    best = np.bincount(chosen, replies[tuples].prod(1), minlength=64)
    assert best.sum() == pytest.approx(1)
    divergence = float((best * np.log(best / replies)).sum())
    assert -1e-12 <= divergence <= kl_bound(n) + 1e-12
    assert best @ rewards >= replies @ rewards
    if n > 1:
        assert (divergence > 0.9 * kl_bound(n)) == (levels == 64)


def test_the_estimate_is_the_mean_over_all_choices():
    draw = np.random.default_rng(1)
    for _ in range(20):
        outcomes, rewards = draw.random(6), draw.integers(0, 3, 6)  # with ties
        for k in (1, 2, 4, 6):
            every = [[*chosen] for chosen in itertools.permutations(range(6), k)]
            expected = np.mean([outcomes[each[choose(rewards[each])]] for each in every])
            assert expected_outcome([*outcomes], [*rewards], k) == pytest.approx(expected)


def test_a_reward_chooses_among_samples():
    tokenizer = Bytes().build([])
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jnp.zeros((1, 2), int))["params"]
    lm = LanguageModel(config, params, tokenizer, context=96)
    result = Generative(Echo(), samples=3, sampling=Sampling(), rows=6, chooser=Longest())(lm)
    outcomes = []
    for _, records in itertools.groupby(result.items, lambda record: record["item"]):
        records = [*records]
        longest = max(len(record["reply"]) for record in records)
        outcomes.append(np.mean([record["outcome"] for record in records if len(record["reply"]) == longest]))
    assert result.values["best@3"] == pytest.approx(np.mean(outcomes))
    assert result.values["best@1"] == pytest.approx(result.values["accuracy"])
    prompts = [Echo().prompt(i) for i in range(2)]
    chosen = best_of(lm, prompts, Longest(), n=3, max_tokens=12, rows=6)
    for i, best in enumerate(chosen):
        texts = [record["reply"] for record in result.items if record["item"] == i]
        assert best.rewards == tuple(map(len, texts))
        assert best.text == max(texts, key=len)
    with pytest.raises(UserError, match="n: got 2 at temperature 0"):
        best_of(lm, prompts, Longest(), n=2, sampling=Sampling(temperature=0.0))
    with pytest.raises(UserError, match=r"prompts: got \d+ tokens in number 0, which leave no room"):
        best_of(lm, [(Message("user", "x" * 200),)], Longest(), n=2)
