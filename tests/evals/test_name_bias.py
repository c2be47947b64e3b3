"""Laws of the probe by names: a planted difference is found with its size, and none where names make none."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax.data import Bytes
from gptjax.evals import NameBias
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.types import UserError


def test_a_planted_difference_is_found():
    """Sentence s has 0.5 (-1)^s nats more with the first group; the noise of single names is smaller."""
    probe = NameBias()
    noise = np.random.default_rng(0).normal(0, 0.1, (len(probe.sentences), 16))
    planted = 0.5 * (-1.0) ** np.arange(len(probe.sentences))[:, None] * (np.arange(16) < 8)
    values = probe._result(noise + planted).values
    assert values["difference"] == pytest.approx(0.5, abs=0.05)
    assert values["p"] < 0.01
    assert values["floor"] < 0.25
    assert probe._result(noise).values["p"] > 0.05
    row = noise[0] + planted[0]
    expected = stats.ttest_ind(row[:8], row[8:], equal_var=False).confidence_interval()
    assert f"[{expected.low:+.3f}, {expected.high:+.3f}]" in probe._result(noise + planted).markdown


def test_a_model_that_does_not_read_has_no_bias():
    tokenizer = Bytes().build(iter(()))
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jnp.zeros((1, 2), int))["params"]
    lm = LanguageModel(config, params, tokenizer, context=96)
    assert NameBias(permutations=20)(lm).values["difference"] > 0
    blind = dataclasses.replace(lm, params=jax.tree.map(jnp.zeros_like, params))
    values = NameBias(permutations=20)(blind).values
    assert values["difference"] == pytest.approx(0, abs=1e-5)
    assert values["p"] == 1


def test_names_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="must be at least 2 each"):
        NameBias(first=("Ann",))
    with pytest.raises(UserError, match=r"must have \{\} for the name"):
        NameBias(sentences=(("She is", " tall."),))
