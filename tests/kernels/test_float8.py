"""Products in 8 bits: the rounding of operands and gradients, and training with them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from drawn import apply

from gptjax.kernels.float8 import Float8Weight, rounded
from gptjax.nn import TransformerConfig

KEYS = jax.random.split(jax.random.key(0), 3)
X, W, G = (jax.random.normal(key, shape) for key, shape in zip(KEYS, ((2, 3, 8), (8, 2, 5), (2, 3, 2, 5)), strict=True))


def fake(x, dtype):
    """The equation, in numpy."""
    x = np.asarray(x, np.float32)
    scale = np.float32(np.abs(x).max() / np.float32(ml_dtypes.finfo(dtype).max))
    return (x / scale).astype(dtype).astype(np.float32) * scale


def test_operands_are_rounded_to_e4m3_and_gradients_to_e5m2():
    y, pull = jax.vjp(lambda x, w: Float8Weight(w).linear(x, 1), X, W)
    dx, dw = pull(G)
    x, w, g = fake(X, ml_dtypes.float8_e4m3fn), fake(W, ml_dtypes.float8_e4m3fn), fake(G, ml_dtypes.float8_e5m2)
    close = {"rtol": 1e-5, "atol": 1e-5}  # sums of up to 10 products in float32
    np.testing.assert_allclose(y, np.einsum("btc,cno->btno", x, w), **close)
    np.testing.assert_allclose(dx, np.einsum("btno,cno->btc", g, w), **close)
    np.testing.assert_allclose(dw, np.einsum("btc,btno->cno", x, g), **close)


def test_the_largest_number_is_exact_and_zeros_stay():
    x = jnp.array([3.0, -1e-3, 0.0])
    assert rounded(x)[0] == 3
    assert rounded(x)[2] == 0
    assert not rounded(jnp.zeros(4)).any()
    big = jnp.full((4,), 3e38, jnp.bfloat16)
    assert jnp.isfinite(rounded(big)).all()


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_learns_as_in_the_compute_dtype_and_is_evaluated_in_it(dtype):
    config = TransformerConfig(vocab=17, layers=2, width=32, heads=2, dtype=dtype)
    text = jax.random.randint(jax.random.key(1), (4, 17), 0, 17)
    final, initial = {}, jax.jit(config.build().init)(jax.random.key(0), text[:, :-1])["params"]
    for float8 in (False, True):
        model, params = dataclasses.replace(config, float8=float8).build(), initial
        optimizer = optax.adam(3e-3)

        def loss(params, model=model):
            rngs = {"dropout": jax.random.key(0)}
            logits, _ = model.apply({"params": params}, text[:, :-1], rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), text[:, 1:]).mean()

        @jax.jit
        def step(params, state, loss=loss, optimizer=optimizer):
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state, value

        state, values = optimizer.init(params), []
        for _ in range(40):
            params, state, value = step(params, state)
            values.append(float(value))
        final[float8] = values
        np.testing.assert_array_equal(apply(model, params, text)[0], apply(config.build(), params, text)[0])
    plain, eight = (np.array(final[x]) for x in (False, True))
    assert (plain != eight).any()
    assert plain[-1] < 0.7 * plain[0]
    np.testing.assert_allclose(eight, plain, rtol=0.05)  # e4m3 has 4 significant bits, e5m2 has 3
