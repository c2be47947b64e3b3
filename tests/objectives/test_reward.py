"""The loss of reward models is its equation, and has the same gradient however a step is split."""

from __future__ import annotations

import collections
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, use
from gptjax.nn import Classifier, RegressorConfig, TransformerConfig
from gptjax.objectives import BradleyTerry
from gptjax.types import PreferencePairs, UserError

CONFIG = RegressorConfig(TransformerConfig(vocab=32, layers=1, width=16, heads=2))
MODEL = Classifier(CONFIG)
B, T = 8, 24


def batch(empty: int) -> PreferencePairs:
    """Pairs of all lengths with margins and padding, and some sequences without a pair."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 32, (B, T), np.int32)
    segments, positions = np.zeros((2, B, T), np.int32)
    for row in range(B - empty):
        ends = (0, *np.sort(draw.choice(np.arange(3, T, 3), 2, replace=False)))
        for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
    margins = draw.uniform(0, 2, B).astype(np.float32)
    return PreferencePairs(tokens, tokens, np.ones((B, T), np.float32), segments, positions, margins)


def fixed(rewards: np.ndarray):
    def apply(*args, **kwargs):
        return (jnp.asarray(rewards)[..., None], None), {}

    return apply


def test_the_loss_is_its_equation():
    rewards = np.random.default_rng(1).normal(size=(B, 2)).astype(np.float32) * 3
    pairs = batch(0)
    chosen, rejected = rewards.T
    centred = BradleyTerry(centering=0.1)(fixed(rewards), {}, pairs)
    expected = np.log1p(np.exp(-(chosen - rejected - pairs.margins))) + 0.1 * (chosen + rejected) ** 2
    assert float(centred["loss"][0] / centred["loss"][1]) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(centred["accuracy"][0]) == (chosen > rejected).sum()
    equal = BradleyTerry()(fixed(np.ones((B, 2), np.float32)), {}, PreferencePairs(*list(vars(pairs).values())[:5]))
    assert float(equal["loss"][0] / B) == pytest.approx(np.log(2), rel=1e-6)
    assert float(equal["accuracy"][0] / B) == 0.5
    with pytest.raises(UserError, match=r"^objective\.centering: got -1, must be at least 0"):
        BradleyTerry(centering=-1)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("centering", [None, 0.1])
def test_the_loss_is_that_of_trl(centering):
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    rewards, pairs = np.random.default_rng(1).normal(size=(B, 2)).astype(np.float32) * 3, batch(0)
    calls = SimpleNamespace(  # what the method takes of a trainer
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    logits = torch.tensor(rewards.T.reshape(-1, 1))
    inputs = {"margin": torch.tensor(pairs.margins), "attention_mask": torch.ones(2 * B, 1)}
    theirs = trl.RewardTrainer.compute_loss(calls, lambda **_: SimpleNamespace(logits=logits), inputs)
    ours = BradleyTerry(centering=centering or 0.0)(fixed(rewards), {}, pairs)
    assert float(ours["loss"][0] / ours["loss"][1]) == pytest.approx(float(theirs), rel=1e-5)


def test_a_step_in_parts_and_on_a_mesh_has_the_same_gradient():
    whole, objective = batch(3), BradleyTerry(centering=0.1)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(MODEL.init)(jax.random.key(0), whole.tokens)["params"])

    @functools.cache
    def gradient(model):
        return jax.jit(jax.value_and_grad(lambda p, part: objective(model.apply, p, part)["loss"], has_aux=True))

    (total, weight), expected = gradient(MODEL)(params, whole)
    assert float(weight) == B - 3, "a sequence without a pair does not count"
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))}
    for cuts in ((0, 2, 8), (0, 2, 4, 6, 8)):
        parts = [jax.tree.map(lambda x: x[a:b], whole) for a, b in itertools.pairwise(cuts)]  # noqa: B023
        made = [gradient(MODEL)(params, part) for part in parts]
        assert sum(float(part[0][0]) for part in made) == pytest.approx(float(total), rel=1e-6)
        added = jax.tree.map(lambda *g: sum(g), *(part[1] for part in made))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), added, expected)
    with use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        (there, count), grads = gradient(Classifier(CONFIG, DEFAULT_RULES))(params, whole)
    assert (float(there), float(count)) == (pytest.approx(float(total), rel=1e-6), float(weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected)
