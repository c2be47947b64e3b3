"""Laws of replies' likelihoods: those of a whole forward pass, and nothing gained by a model that does not read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data import Bytes, Message, chat
from gptjax.evals import ReplyLikelihood
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Talk:
    """Conversations of one or two replies."""

    count: int = 5

    def documents(self, split):
        for i in range(self.count):
            turns = (Message("user", f"{i}?"), Message("assistant", "yes" * (i + 1)))
            yield (*turns, Message("user", "sure?"), Message("assistant", "no")) if i % 2 else turns

    def fingerprint(self):
        return "talk"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    tokenizer = Bytes().build(iter(()))
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jnp.zeros((1, 2), int))["params"]
    return LanguageModel(config, params, tokenizer, context=96)


def test_perplexity_is_that_of_a_whole_forward_pass(lm):
    result = ReplyLikelihood(Talk(), others=2)(lm)
    nats, tokens = 0.0, 0.0
    for conversation in Talk().documents("validation"):
        ids, weights = (np.array(x) for x in chat.render(conversation, lm.tokenizer))
        logits = lm.logits(ids[None, :-1])[0]
        logprobs = np.array(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
        nats, tokens = nats - logprobs @ weights[1:], tokens + weights[1:].sum()
    assert result.values["perplexity_per_token"] == pytest.approx(np.exp(nats / tokens), rel=1e-4)
    assert (result.values["replies"], result.values["conversations"], result.values["tokens"]) == (7, 5, tokens)
    assert result.values["own_first"] == np.mean([item["nats"][0] < min(item["nats"][1:]) for item in result.items])
    assert all(len({*item["nats"]}) == 3 for item in result.items)  # three contexts, none of them twice


def test_a_model_that_does_not_read_gains_nothing(lm):
    blind = dataclasses.replace(lm, params=jax.tree.map(jnp.zeros_like, lm.params))
    values = ReplyLikelihood(Talk(), others=2)(blind).values
    assert values["nats_gained"] == pytest.approx(0, abs=1e-6)
    assert values["own_first"] == 0


def test_too_few_conversations_are_refused(lm):
    with pytest.raises(UserError, match="others: got 3, must be below 3"):
        ReplyLikelihood(Talk(3))(lm)
