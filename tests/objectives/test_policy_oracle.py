"""Policy gradients are exact: over every reply that a model can write, weighted by its probability, the mean gradient
is that of the expected reward, and those of the KL estimators are those of the divergences that they claim."""

import base64
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.interop.huggingface import from_tensors
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import PPO, PolicyGradient
from gptjax.objectives.advantages import relative_rewards
from gptjax.objectives.policy import replies_logprobs
from gptjax.types import BESIDE, Episodes

MEAN = PolicyGradient(deviation="none", aggregation="constant", max_tokens=1)
LEAVE_ONE_OUT = dataclasses.replace(MEAN, baseline="leave_one_out")
WHOLE = PolicyGradient(baseline="leave_one_out", deviation="none", aggregation="sequence", ratio="sequence")
CRITIC = PPO(kl=0, gae_lambda=1, whiten=False, value_coefficient=1e-9, aggregation="constant", max_tokens=1)
GROUP = 3


def every_reply(vocab, length, prompt, temperature=1.0) -> Episodes:
    """All replies to one prompt as a batch, without their rewards."""
    replies = np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)
    rows = np.concatenate([np.tile(np.int32(prompt), (len(replies), 1)), replies], 1)
    B, T = len(rows), rows.shape[1] - 1
    weights = np.zeros((B, T), np.float32)
    weights[:, len(prompt) - 1 :] = 1
    ones = np.ones(B, np.float32)
    return Episodes(
        rows[:, :-1], rows[:, 1:], weights, np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        weights * 0, np.zeros((B, T), np.int32), ones * 0, np.zeros(B, np.int32), ones, ones * np.float32(temperature),
    )  # fmt: skip


def group_advantages(objective, rewards, probabilities):
    """Mean advantage of each reply over all groups with two others, drawn by their probabilities."""
    values = np.unique(rewards)
    mass = np.array([probabilities[rewards == value].sum() for value in values])
    groups = np.array(list(itertools.product(range(len(values)), repeat=GROUP)))
    numbers = np.repeat(np.arange(len(groups)), GROUP).astype(np.int32)
    made = relative_rewards(values[groups].ravel(), numbers, objective.baseline, objective.deviation)
    first = np.asarray(made).reshape(-1, GROUP)[:, 0] * mass[groups[:, 1:]].prod(-1)
    return np.array([first[values[groups[:, 0]] == reward].sum() for reward in rewards], np.float32)


def gradients(objective, apply, params, batch):
    """Mean gradient of the objective over all replies, and the gradient of the expected reward."""
    frozen = (params,) if objective.reference else ()
    prepared = jax.jit(lambda p, b: objective.prepare(apply, p, b, *frozen))(params, batch)

    def likelihoods(params):
        return jnp.exp(jnp.sum(replies_logprobs(apply, params, batch).logprobs * batch.weights, -1))

    probabilities = np.asarray(likelihoods(params))
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    if isinstance(objective, PolicyGradient):
        made = group_advantages(objective, batch.rewards, probabilities)
        prepared = dataclasses.replace(prepared, advantages=made[:, None] * batch.weights)
    drawn = prepared.advantages * probabilities[:, None] * len(probabilities)
    # The sampler is the policy itself.
    prepared = dataclasses.replace(prepared, advantages=drawn, logprobs=prepared.old_logprobs)

    def loss(params):
        total, weight = objective(apply, params, prepared)["loss"]
        return total / weight

    found = jax.jit(jax.grad(loss))(params)
    expected = jax.jit(jax.grad(lambda p: -jnp.sum(likelihoods(p) * batch.rewards)))(params)
    return found, expected


def same(found, expected, factor=1.0, tolerance=2e-5):
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    assert largest > 1e-4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, factor * b, rtol=0, atol=tolerance * largest)


@pytest.fixture(scope="module")
def tiny():
    model = Transformer(TransformerConfig(vocab=3, layers=1, width=8, heads=2))
    one = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    keys = jax.random.split(jax.random.key(1), 3)
    one, other = (jax.tree.map(lambda x, key=key: x + 0.5 * jax.random.normal(key, x.shape), one) for key in keys[:2])
    critic = {"value": jax.random.normal(keys[2], (8, 1)), "value_bias": jnp.ones(1)}
    return model, one, other, critic


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("objective", "factor"),
    [(WHOLE, 1), (LEAVE_ONE_OUT, 1), (MEAN, (GROUP - 1) / GROUP), (CRITIC, 1)],
    ids=["whole replies", "leave one out", "group mean", "critic"],
)
def test_the_mean_gradient_is_that_of_the_expected_reward(objective, factor, tiny):
    model, params, _, critic = tiny
    batch = every_reply(3, 3, [1, 2], temperature=1.5)
    rewards = np.float32([np.sum(reply == [2, 0, 1]) for reply in batch.targets[:, 1:]])
    batch = dataclasses.replace(batch, rewards=rewards)
    found, expected = gradients(objective, model.apply, params | {BESIDE: critic}, batch)
    found.pop(BESIDE), expected.pop(BESIDE)  # the critic's own loss
    same(found, expected, factor)


@pytest.mark.alone
def test_divergences_have_the_gradients_that_they_claim(tiny):
    """Replies of one token, as a batch whose weights are their probabilities."""
    model, params, reference, _ = tiny
    batch = every_reply(3, 1, [1, 2])

    def logprobs(params):
        return replies_logprobs(model.apply, params, batch).logprobs[:, -1]

    forward = lambda p: jnp.sum(jnp.exp(logprobs(p)) * (logprobs(p) - logprobs(reference)))  # noqa: E731
    backward = lambda p: jnp.sum(jnp.exp(logprobs(reference)) * (logprobs(reference) - logprobs(p)))  # noqa: E731
    divergence, to_reference, from_reference = forward(params), jax.grad(forward)(params), jax.grad(backward)(params)
    drawn = batch.weights * np.asarray(jnp.exp(logprobs(params)))[:, None]
    for estimator, place, expected in (
        ("k1", "loss", None),
        ("k2", "loss", to_reference),
        ("weighted_k3", "loss", to_reference),
        ("k3", "loss", from_reference),
        ("k1", "reward", to_reference),
    ):
        objective = PolicyGradient(
            baseline="none", deviation="none", kl=1.0, kl_in=place, kl_estimator=estimator, correction="none"
        )
        prepare = jax.jit(lambda *p, objective=objective: objective.prepare(model.apply, p[0], batch, p[1]))
        prepared = prepare(params, reference)
        prepared = dataclasses.replace(prepared, weights=drawn)

        def loss(params, objective=objective, prepared=prepared):
            metrics = objective(model.apply, params, prepared)
            return metrics["loss"][0], metrics

        found, metrics = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert float(metrics["kl"][0]) == pytest.approx(float(divergence), rel=1e-4)
        if place == "loss" and estimator != "k2":
            assert float(metrics["loss"][0]) == pytest.approx(float(divergence), rel=1e-4)
        if expected is None:
            largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(to_reference))
            assert max(float(np.abs(g).max()) for g in jax.tree.leaves(found)) < 2e-5 * largest
        else:
            same(found, expected)


@pytest.mark.real
def test_the_mean_gradient_of_a_trained_sorter(shared):
    """All 729 outputs of gpt_nano_sort for one input, rewarded for digits in descending order."""
    raw = json.loads((shared / "models" / "gpt_nano_sort" / "gpt-nano-sort-model.json").read_text())
    c = raw.pop("config")
    known = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    tensors = {
        name: np.frombuffer(base64.b64decode(entry["data"]), np.float32).reshape(entry["shape"])
        for name, entry in raw.items()
    }
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {name: np.ascontiguousarray(x.T) if name.endswith(linear) else x for name, x in tensors.items()}
    fields = {**c, **known, "n_positions": c["block_size"], "tie_word_embeddings": False}
    config, params = from_tensors(fields, tensors)
    digits = [0, 2, 1, 1, 0, 2]
    batch = every_reply(3, 6, digits, temperature=4.0)
    rewards = np.float32([np.mean(reply == sorted(digits, reverse=True)) for reply in batch.targets[:, 5:]])
    batch = dataclasses.replace(batch, rewards=rewards)
    found, expected = gradients(WHOLE, config.build().apply, params, batch)
    same(found, expected, tolerance=1e-4)
