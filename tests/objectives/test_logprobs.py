"""Log-probabilities and entropies of targets, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.objectives.logprobs import target_logprobs
from gptjax.types import Batch

B, T, V = 3, 5, 16


@pytest.mark.parametrize("temperature", [1.0, 0.5, [0.5, 1.0, 2.0]])
def test_logprobs_and_entropies_are_of_the_distribution_at_the_temperature(temperature):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (B, T, V)), rng.integers(0, V, (B, T), np.int32)
    batch = Batch(targets, targets, *(np.ones((B, T), np.int32) for _ in range(3)))

    def apply(variables, tokens, positions, segments, mutable):
        return (variables["params"], None), {"losses": {"balance": jnp.float32(0.5)}}

    temperature = np.asarray(temperature, np.float32)
    got = jax.jit(lambda params: target_logprobs(apply, params, batch, temperature, with_entropy=True))(logits)
    scaled = logits / temperature[..., None, None]
    logprobs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.logprobs, np.take_along_axis(logprobs, targets[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(logprobs) * logprobs).sum(-1), rtol=1e-5)
    assert float(got.losses["losses"]["balance"]) == 0.5
    assert target_logprobs(apply, logits, batch).entropy is None
