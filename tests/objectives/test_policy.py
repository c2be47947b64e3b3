"""Policy gradients begin at ratio 1, have the same gradient however a step is split, and give nothing for nothing."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed.sharding import MeshConfig, global_array, use
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import DAPO, GRPO, GSPO, RLOO, DrGRPO, PolicyGradient
from gptjax.types import Episodes

CONFIG = TransformerConfig(vocab=16, layers=1, width=16, heads=2, dropout=0.5)
MODEL = Transformer(CONFIG)
B, T = 8, 12
OBJECTIVES = [GRPO(), DrGRPO(), DAPO(), GSPO(kl=0.1, kl_estimator="weighted_k3"), RLOO(), PolicyGradient(entropy=0.1)]


def episodes(seed: int = 0) -> Episodes:
    """Two groups of four replies of all lengths, with prompts, a tool's tokens, padding, one cut off and one absent."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(0, 16, (2, B, T), np.int32)
    weights, segments = np.zeros((B, T), np.float32), np.zeros((B, T), np.int32)
    for row, length in enumerate(draw.permutation(np.arange(4, 4 + B))):
        segments[row, :length], weights[row, 2:length] = 1, 1
        weights[row, 3] = 0
    groups, finished = np.repeat([0, 1], 4).astype(np.int32), np.ones(B, np.float32)
    groups[-1], finished[1] = -1, 0
    return Episodes(
        tokens, targets, weights, segments, np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        logprobs=(weights * draw.uniform(-4, -1, (B, T))).astype(np.float32),
        versions=np.where(weights > 0, 0, -1).astype(np.int32),
        rewards=np.float32([1, 0, 0.5, 1, 0, 0, 0, 1]),
        groups=groups, finished=finished, temperature=draw.uniform(0.7, 1.3, B).astype(np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    made = [jax.jit(MODEL.init)(key, jnp.zeros((1, 4), jnp.int32))["params"] for key in keys]
    return [jax.tree.map(lambda x: x * 2, one) for one in made]


def prepared(objective, params, batch, model=MODEL, parts=1):
    frozen = (params[1],) if objective.reference else ()
    return jax.jit(lambda p, b, *f: objective.prepare(model.apply, p, b, *f, parts=parts))(params[0], batch, *frozen)


def gradient(objective, model=MODEL):
    """(params, batch) -> metrics and gradient, jitted."""

    def loss(params, batch):
        metrics = objective(model.apply, params, batch)
        return metrics["loss"][0], metrics

    made = jax.jit(jax.grad(loss, has_aux=True))
    return lambda params, batch: made(params, batch)[::-1]


def only(weights, first, last):
    """Weights of the replies first .. last - 1."""
    return weights * ((np.arange(B) >= first) & (np.arange(B) < last))[:, None]


def close(found, expected, tolerance=1e-6):
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest), found, expected)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_step_in_parts_and_on_a_mesh_has_the_same_gradient(objective, params):
    """The parameters have moved since the batch was prepared: ratios are not 1, and some are clipped."""
    whole = prepared(objective, params, episodes())
    moved = jax.tree.map(lambda a, b: a + 0.1 * b, *params)
    step = gradient(objective)
    metrics, expected = step(moved, whole)
    for cuts in ((0, 3, 8), (0, 1, 3, 4, 8)):
        parts = [dataclasses.replace(whole, weights=only(whole.weights, *cut)) for cut in itertools.pairwise(cuts)]
        found = [step(moved, part) for part in parts]
        close(jax.tree.map(lambda *g: sum(g), *(grads for _, grads in found)), expected)
        for name, pair in metrics.items():
            added = np.sum([part[name] for part, _ in found], 0)
            np.testing.assert_allclose(added, pair, rtol=1e-5, atol=1e-5, err_msg=name)
    with use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = Transformer(CONFIG)
        batch = global_array(episodes(), sharded.rules)
        there = prepared(objective, params, batch, sharded, parts=2)
        _, grads = gradient(objective, sharded)(moved, there)
    close(there.advantages, whole.advantages)
    close(grads, expected, 1e-5)
