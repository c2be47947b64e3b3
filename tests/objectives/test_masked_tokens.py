"""The masked-token loss: who is hidden and how, that the loss is of those alone, and that it can be learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import Encoder, EncoderConfig
from gptjax.objectives import MaskedTokens
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, UserError

MASK = 31
OBJECTIVE = MaskedTokens(mask_token=MASK, vocab=31, unmasked_ids=(0,))


def batch(tokens) -> Batch:
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens, tokens, np.ones((B, T), np.float32), np.ones((B, T), np.int32), positions)


def test_15_of_100_are_chosen_and_80_10_10_is_done_with_them():
    tokens = jax.random.randint(jax.random.key(0), (200, 1_000), 0, 31)
    real = jnp.arange(1_000) < 900
    hidden, chosen = OBJECTIVE.mask(tokens, jnp.broadcast_to(real, tokens.shape), jax.random.key(1))
    may = real & (tokens != 0)
    assert not (chosen & ~may).any()
    np.testing.assert_array_equal(jnp.where(chosen, tokens, hidden), tokens)
    count = float(chosen.sum())  # a share of n has a deviation of 0.5 / sqrt(n) at most
    assert abs(count / float(may.sum()) - 0.15) < 5 * 0.5 / float(may.sum()) ** 0.5
    assert abs(float((chosen & (hidden == MASK)).sum()) / count - 0.8) < 5 * 0.5 / count**0.5
    same = 0.1 + 0.1 / 31  # a random token may be the token itself
    assert abs(float((chosen & (hidden == tokens)).sum()) / count - same) < 5 * 0.5 / count**0.5


def test_the_choice_is_the_same_on_a_mesh():
    tokens = np.random.default_rng(0).integers(0, 31, (8, 16), np.int32)
    expected = OBJECTIVE.mask(jnp.asarray(tokens), jnp.asarray(tokens != 3), jax.random.key(1))
    with sharding.use(MeshConfig(data=8).make()):
        placed, real = (sharding.global_array(x, DEFAULT_RULES) for x in (tokens, tokens != 3))
        found = jax.jit(OBJECTIVE.mask)(placed, real, jax.random.key(1))
        assert [x.sharding.spec[0] for x in found] == [placed.sharding.spec[0]] * 2
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_loss_is_of_the_chosen_tokens():
    """A model that gives each token that it reads a logit of 9: only what is not hidden can be known."""
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (8, 64), 1, 31))
    seen = []

    def apply(variables, tokens, positions, segments, mutable, rngs=None):
        seen.append(tokens)
        return (9 * jax.nn.one_hot(tokens, 32), None), {}

    metrics = OBJECTIVE(apply, {}, batch(tokens), jax.random.key(1))
    read = seen[0]
    chosen_and_kept = metrics["accuracy"][0]
    total = metrics["loss"][1]
    denominator = np.log(np.exp(9) + 31)
    expected = total * denominator - 9 * chosen_and_kept
    np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-5)
    assert (read != tokens).sum() == total - chosen_and_kept > 0
    again = [OBJECTIVE(apply, {}, batch(tokens))["loss"][0] for _ in range(2)]
    assert again[0] == again[1]
    assert OBJECTIVE(apply, {}, batch(tokens), jax.random.key(2))["loss"] != metrics["loss"]


def test_an_encoder_learns_to_fill_in():
    """Rows that count up: any hidden token follows from its neighbours."""
    config = EncoderConfig(vocab=32, layers=2, width=32, heads=2)
    model = Encoder(config)
    rows = (np.arange(16, dtype=np.int32)[:, None] + np.arange(16, dtype=np.int32)) % 16 + 1
    data = batch(rows)
    optimizer = optax.adam(3e-3)
    state = train_state.create(jax.jit(model.init)(jax.random.key(0), rows)["params"], optimizer, jax.random.key(1))
    objective = jax.jit(functools.partial(OBJECTIVE, model.apply))
    step = make_step(OBJECTIVE, model.apply, optimizer)
    before = objective(state.params, data)
    for _ in range(300):
        state, _ = step(state, data)
    after = objective(state.params, data)
    assert before["loss"][0] / before["loss"][1] > 3
    assert after["loss"][0] / after["loss"][1] < 0.5


@pytest.mark.parametrize(
    ("change", "field"), [({"mask_probability": 0.0}, "mask_probability"), ({"mask_token": -1}, "mask_token")]
)
def test_a_bad_field_is_named(change, field):
    with pytest.raises(UserError, match=f"objective.{field}: got"):
        MaskedTokens(**{"mask_token": 1, "vocab": 2, **change})
