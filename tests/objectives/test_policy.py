"""Policy gradients begin at ratio 1, have the same gradient however a step is split, and give nothing for nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import MeshConfig, global_array, use
from gptjax.nn import LoRA, Transformer, TransformerConfig
from gptjax.objectives import DAPO, GRPO, GSPO, PPO, RLOO, DrGRPO, PolicyGradient
from gptjax.objectives.policy import replies_logprobs
from gptjax.types import BESIDE, Episodes, UserError

CONFIG = TransformerConfig(vocab=16, layers=1, width=16, heads=2, dropout=0.5)
MODEL = Transformer(CONFIG)
B, T = 8, 12
OBJECTIVES = [
    GRPO(),
    DrGRPO(),
    DAPO(entropy=0.1),
    GSPO(kl=0.1, kl_estimator="weighted_k3"),
    RLOO(),
    PPO(),
]


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
    critic = {"value": jax.random.normal(jax.random.key(1), (16, 1)), "value_bias": jnp.ones(1)}
    return [jax.tree.map(lambda x: x * 2, one) | {BESIDE: critic} for one in made]


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
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest), found, expected)


@pytest.mark.sampled
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_step_in_parts_has_the_same_gradient(objective, params):
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


@pytest.mark.parametrize("objective", [OBJECTIVES[3], OBJECTIVES[5]], ids=lambda o: type(o).__name__)
def test_a_step_on_a_mesh_has_the_same_gradient(objective, params):
    """Prepared in parts there, as a whole here."""
    whole = prepared(objective, params, episodes())
    moved = jax.tree.map(lambda a, b: a + 0.1 * b, *params)
    _, expected = gradient(objective)(moved, whole)
    with use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        sharded = Transformer(CONFIG)
        batch = global_array(episodes(), sharded.rules)
        there = prepared(objective, params, batch, sharded, parts=2)
        _, grads = gradient(objective, sharded)(moved, there)
    close(there.advantages, whole.advantages, 1e-5)
    close(grads, expected, 1e-5)


@pytest.mark.parametrize("objective", [RLOO(), PPO()], ids=lambda o: type(o).__name__)
def test_a_stage_begins_at_ratio_1_and_divergence_0(objective, params):
    """With dropout in the model, with an adapter stacked on another's result, and the batch prepared in parts."""
    info, key = parameter_info(MODEL), jax.random.key(1)
    lora = LoRA(rank=2, match=("attention/q", "mlp/up"))
    new, merge = jax.jit(functools.partial(lora.init, info=info)), jax.jit(lora.merge)
    first = jax.tree.map(lambda x: x + 0.1, new(jax.random.key(2), params[0]))
    stacked = merge(params[0], first) | {BESIDE: params[0][BESIDE]}
    fresh = merge(stacked, new(jax.random.key(3), stacked)) | {BESIDE: params[0][BESIDE]}
    batch = prepared(objective, [fresh, stacked], episodes(), parts=2)
    np.testing.assert_allclose(batch.old_logprobs, batch.reference_logprobs, atol=1e-6)
    metrics = objective(MODEL.apply, fresh, batch, key)
    assert metrics["clipped"][0] == 0
    assert float(metrics["kl"][0]) == pytest.approx(0, abs=1e-6)
    ratio = jnp.exp(replies_logprobs(MODEL.apply, fresh, batch).logprobs - batch.old_logprobs)
    np.testing.assert_allclose(jnp.where(batch.weights > 0, ratio, 1), 1, atol=1e-5)


def test_nothing_to_learn_from_gives_zero(params):
    """Every reply cut off and left out, every reply absent, and groups whose rewards are all equal."""
    start = episodes()
    empty = [
        (DAPO(), dataclasses.replace(start, finished=np.zeros(B, np.float32))),
        (PPO(), dataclasses.replace(start, groups=np.full(B, -1, np.int32))),
        (DrGRPO(), dataclasses.replace(start, rewards=np.full(B, 0.1, np.float32))),
    ]
    for objective, batch in empty:
        metrics, grads = gradient(objective)(params[0], prepared(objective, params, batch))
        assert metrics["loss"][0] == 0, objective
        assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads)), objective
        assert np.isfinite([x for pair in metrics.values() for x in pair]).all(), objective


def test_masked_replies_count_neither_above_nor_below(params):
    """A reply that was cut off: the loss is that of the others, though it is in their baseline."""
    batch, objective = episodes(), DAPO()
    cut = prepared(objective, params, batch)
    kept = prepared(dataclasses.replace(objective, mask_truncated=False), params, batch)
    np.testing.assert_array_equal(cut.advantages, kept.advantages)
    assert cut.weights[1].sum() == 0
    assert kept.weights[1].sum() > 0
    metrics, _ = gradient(objective)(params[0], cut)
    assert metrics["loss"][1] == kept.weights.sum() - kept.weights[1].sum()


def test_corrections_weigh_what_was_sampled(params):
    """Truncated or masked at the cap, by token or by reply; the loss's weight stays."""
    batch = prepared(GRPO(), params, episodes())
    off = np.where(batch.weights > 0, batch.old_logprobs - batch.logprobs, 0)
    replies = np.exp(off.sum(-1, keepdims=True) * np.ones_like(off))
    for kind, weight in {
        "token_truncate": np.minimum(np.exp(off), 1.5),
        "token_mask": np.exp(off) * (np.exp(off) <= 1.5),
        "sequence_truncate": np.minimum(replies, 1.5),
        "sequence_mask": replies * (replies <= 1.5),
        "none": np.ones_like(off),
    }.items():
        objective = PolicyGradient(correction=kind, correction_cap=1.5)
        metrics, _ = gradient(objective)(params[0], batch)
        expected = -float(np.sum(weight * batch.advantages * batch.weights))
        assert float(metrics["policy_loss"][0]) == pytest.approx(expected, rel=1e-4, abs=1e-4), kind
        assert metrics["policy_loss"][1] == batch.weights.sum()


def test_bad_settings_name_the_field():
    for settings, field in (
        ({"clip_low": -1}, "clip_low"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"correction_cap": 0}, "correction_cap"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"kl_in": "reward", "kl_estimator": "weighted_k3"}, "kl_estimator"),
    ):
        with pytest.raises(UserError, match=field):
            PolicyGradient(**settings)
    for settings in ({"gamma": 2}, {"gae_lambda": -1}, {"value_coefficient": 0}, {"value_clip": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            PPO(**settings)
