"""A stage of policy gradients prepares its batches, learns, and drops its critic from the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data import Pretrain, PyDocs
from gptjax.nn import LoRA, Transformer, TransformerConfig
from gptjax.objectives import PPO
from gptjax.optim import AdamW
from gptjax.train.program import program
from gptjax.train.stage import Stage
from gptjax.types import BESIDE, Episodes

MODEL = Transformer(TransformerConfig(vocab=8, layers=1, width=8, heads=2))
B, T = 8, 6


def episodes() -> Episodes:
    """Replies of one token, rewarded if it is 3."""
    tokens, ones = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones(B, np.float32)
    targets = np.tile(np.arange(B, dtype=np.int32)[:, None], (1, T))
    weights = np.zeros((B, T), np.float32)
    weights[:, 2] = 1
    return Episodes(
        tokens, targets, weights, np.ones((B, T), np.int32), tokens, weights * np.float32(np.log(1 / 8)),
        tokens * 0, (np.arange(B) == 3).astype(np.float32), np.zeros(B, np.int32), ones, ones,
    )  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize(("adapter", "factor"), [(None, 2), (LoRA(rank=2), 1.2)], ids=["whole", "adapters"])
def test_a_critic_is_trained_beside_the_model_and_dropped(adapter, factor):
    stage = Stage(
        Pretrain(PyDocs(), length=T, batch=B),
        PPO(kl=0.01),
        AdamW(learning_rate=3e-2),
        20,
        accumulate=2,
        adapter=adapter,
    )
    functions = program(stage, MODEL)
    frozen = (jax.jit(functions.init_params)(),)
    state, batch = jax.jit(functions.init_state)(*frozen), episodes()

    def likelihood(params):
        logits, _ = MODEL.apply({"params": functions.merge(params, *frozen)}, batch.tokens)
        return float(jax.nn.softmax(logits[0, 2])[3])

    before = likelihood(state.params)
    critic = state.params[BESIDE]
    assert not any(np.any(x) for x in jax.tree.leaves(critic))
    for _ in range(20):
        prepared = functions.prepare(state.params, batch, *frozen)
        np.testing.assert_allclose(prepared.advantages.sum(), 0, atol=1e-4)
        state, metrics = functions.step(state, prepared, *frozen)
        assert np.isfinite(float(metrics["value_loss"][0]))
    assert likelihood(state.params) > factor * before
    assert jnp.any(state.params[BESIDE]["value_bias"] != 0)
    assert jax.tree.structure(functions.merge(state.params, *frozen)) == jax.tree.structure(frozen[0])
