"""Preference losses equal their equations, begin at their fixed points, and have the same gradient however a step is
split."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import MeshConfig, use
from gptjax.nn import LoRA, Transformer, TransformerConfig
from gptjax.objectives import CPO, DPO, IPO, ORPO, SimPO
from gptjax.objectives.preference import Replies, log_likelihoods
from gptjax.types import PreferencePairs, UserError

CONFIG = TransformerConfig(vocab=32, layers=2, width=16, heads=2, dropout=0.5)
MODEL = Transformer(CONFIG)
B, T = 8, 24
OBJECTIVES = [
    DPO(0.3),
    DPO(0.3, label_smoothing=0.1),
    IPO(0.2),
    SimPO(),
    CPO(0.2, 0.5),
    ORPO(0.7),
    DPO(2.0, length_normalised=True),
    DPO(0.3, reference_free=True),
]
REFERENCES = [objective for objective in OBJECTIVES if objective.reference]


def batch(seed: int = 0, empty: int = 1) -> PreferencePairs:
    """Pairs of all lengths with prompts and padding, and some sequences without a pair."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(0, 32, (2, B, T), np.int32)
    weights, segments, positions = np.zeros((B, T), np.float32), *np.zeros((2, B, T), np.int32)
    for row in range(B - empty):
        ends = (0, *np.sort(draw.choice(np.arange(3, T, 3), 2, replace=False)))
        for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
            weights[row, draw.integers(start, end) : end] = 1
    return PreferencePairs(tokens, targets, weights, segments, positions)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    made = [jax.jit(MODEL.init)(key, jnp.zeros((1, 4), jnp.int32))["params"] for key in keys]
    return [jax.tree.map(lambda x: x * 2, one) for one in made]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


EXPECTED = {
    OBJECTIVES[0]: lambda c, r, cr, rr, nc, nr: -np.log(sigmoid(0.3 * (c - cr - r + rr))),
    OBJECTIVES[1]: lambda c, r, cr, rr, nc, nr: (
        -0.9 * np.log(sigmoid(0.3 * (c - cr - r + rr))) - 0.1 * np.log(sigmoid(-0.3 * (c - cr - r + rr)))
    ),
    OBJECTIVES[2]: lambda c, r, cr, rr, nc, nr: ((c - cr) / nc - (r - rr) / nr - 2.5) ** 2,
    OBJECTIVES[3]: lambda c, r, cr, rr, nc, nr: -np.log(sigmoid(2 * (c / nc - r / nr) - 1)),
    OBJECTIVES[4]: lambda c, r, cr, rr, nc, nr: -np.log(sigmoid(0.2 * (c - r))) - 0.5 * c / nc,
    OBJECTIVES[5]: lambda c, r, cr, rr, nc, nr: (
        -c / nc
        - 0.7 * np.log(sigmoid(np.log(np.exp(c / nc) / (1 - np.exp(c / nc)) * (1 - np.exp(r / nr)) / np.exp(r / nr))))
    ),
    OBJECTIVES[6]: lambda c, r, cr, rr, nc, nr: -np.log(sigmoid(2 * ((c - cr) / nc - (r - rr) / nr))),
    OBJECTIVES[7]: lambda c, r, cr, rr, nc, nr: -np.log(sigmoid(0.3 * (c - r))),
}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_losses_equal_their_equations(objective):
    draw = np.random.default_rng(0)
    n = draw.integers(1, 30, (2, 50)).astype(float)
    policy, reference = -draw.uniform(0.05, 3, (2, 2, 50)) * n
    made = [Replies(*map(jnp.float32, (*side, *n))) for side in (policy, reference)]
    expected = EXPECTED[objective](*policy, *reference, *n)
    np.testing.assert_allclose(objective.loss(*made), expected, rtol=2e-5, atol=2e-5)


def test_certain_replies_have_finite_losses_and_gradients():
    """exp(c / |c|) = 1, where the odds are infinite, and a reply that is all but impossible."""
    for objective in OBJECTIVES:
        for c, r in ((0.0, -1e4), (-1e4, 0.0)):

            def loss(c, r, objective=objective):
                one = jnp.ones(1)
                return objective.loss(Replies(c * one, r * one, one, one), Replies(one, one, one, one)).sum()

            assert all(map(np.isfinite, (loss(c, r), *jax.grad(loss, (0, 1))(c, r)))), objective


def test_a_reply_has_the_likelihood_that_it_has_alone(params):
    packed = batch()
    together, _ = log_likelihoods(MODEL.apply, params[0], packed)
    for row in range(B - 1):
        for number, name in ((1, "chosen"), (2, "rejected")):
            mine = packed.segments[row] == number
            logits, _ = MODEL.apply({"params": params[0]}, packed.tokens[row, mine][None])
            logprobs = jax.nn.log_softmax(logits[0])[np.arange(mine.sum()), packed.targets[row, mine]]
            expected = float((logprobs * packed.weights[row, mine]).sum())
            assert float(getattr(together, name)[row]) == pytest.approx(expected, rel=1e-5)
            assert int(getattr(together, f"{name}_tokens")[row]) == packed.weights[row, mine].sum()


@pytest.mark.sampled
@pytest.mark.parametrize("objective", REFERENCES, ids=str)
def test_a_stage_begins_where_nothing_is_preferred(objective, params):
    """Margin 0 to the bit, with dropout in the model and with fresh adapters: DPO's loss is log 2."""
    info, key = parameter_info(MODEL), jax.random.key(1)
    lora = LoRA(rank=2, match=("attention/q", "mlp/up"))
    whole = objective(MODEL.apply, params[0], batch(), key, params[0])
    adapters = jax.jit(functools.partial(lora.init, info=info))(jax.random.key(2), params[0])
    low_rank = lora.objective(objective)(MODEL.apply, adapters, batch(), key, params[0])
    rounded = dataclasses.replace(lora, bits=4, group=8)
    frozen = rounded.freeze(params[0], info)
    quantised = rounded.objective(objective)(MODEL.apply, adapters, batch(), key, frozen)
    start = np.log(2) if isinstance(objective, DPO) else 2.5**2
    for metrics in (whole, low_rank, quantised):
        assert metrics["margin"][0] == 0
        assert metrics["accuracy"][0] / metrics["accuracy"][1] == 0.5
        assert metrics["loss"][1] == B - 1, "a sequence without a pair does not count"
        assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(start, rel=1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[5]], ids=str)
def test_a_step_in_parts_and_on_a_mesh_has_the_same_gradient(objective, params):
    whole = batch(empty=3)

    given = params if objective.reference else params[:1]

    @functools.cache
    def gradient(model):
        def loss(params, part, *frozen):
            return objective(model.apply, params, part, None, *frozen)["loss"]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (total, weight), expected = gradient(MODEL)(given[0], whole, *given[1:])
    tolerance = {"rtol": 2e-5, "atol": 1e-5 * max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))}
    for cuts in ((0, 2, 8), (0, 2, 4, 6, 8)):
        parts = [jax.tree.map(lambda x: x[a:b], whole) for a, b in itertools.pairwise(cuts)]  # noqa: B023
        made = [gradient(MODEL)(given[0], part, *given[1:]) for part in parts]
        assert sum(float(part[0][1]) for part in made) == float(weight)
        assert sum(float(part[0][0]) for part in made) == pytest.approx(float(total), rel=1e-5)
        added = jax.tree.map(lambda *g: sum(g), *(part[1] for part in made))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), added, expected)
    with use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        (there, count), grads = gradient(Transformer(CONFIG))(given[0], whole, *given[1:])
    assert (float(there), float(count)) == (pytest.approx(float(total), rel=1e-5), float(weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected)


def test_bad_settings_name_the_field():
    for make in (lambda: DPO(0), lambda: DPO(label_smoothing=0.5), lambda: IPO(-1), lambda: SimPO(beta=0)):
        with pytest.raises(UserError, match=r"beta|label_smoothing"):
            make()
