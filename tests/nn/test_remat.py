"""Rematerialisation by names: results stay, and each saved activation takes memory and spares its computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import from_json, to_json
from gptjax.nn import Transformer, TransformerConfig
from gptjax.types import UserError

CONFIG = TransformerConfig(vocab=32, layers=16, width=32, heads=4, hidden=64)
B, T = 8, 64
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (B, T))


def gradient(remat):
    """Gradient, FLOPs and bytes of temporaries."""
    model = Transformer(dataclasses.replace(CONFIG, remat=remat))
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), TOKENS)["params"]
    loss = lambda p: jnp.sum(jnp.square(model.apply({"params": p}, TOKENS)[0]))  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    flops = compiled.cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]
    return compiled(params), flops, compiled.memory_analysis().temp_size_in_bytes


def test_named_activations_are_saved():
    choices = ("nothing_saveable", ("queries", "mlp_up"), ("queries", "mlp_up@host"))
    (nothing, most, least), (names, flops, bytes_), (offloaded, again, _) = map(gradient, choices)
    for found in (names, offloaded):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, nothing)
    products = 2 * B * T * CONFIG.width * (CONFIG.width + CONFIG.hidden)  # of one layer: a loop's body counts once
    assert most - flops == pytest.approx(products, rel=0.05)
    assert most - again == pytest.approx(products, rel=0.05)
    assert bytes_ - least == pytest.approx(CONFIG.layers * 4 * B * T * (CONFIG.width + CONFIG.hidden), rel=0.2)


def test_names_are_saved_and_checked():
    config = dataclasses.replace(CONFIG, remat=("queries", "mlp_up@host"))
    assert from_json(to_json(config)) == config
    with pytest.raises(UserError, match=r"model\.remat: got 'query', must be None, one of .*, or names of activations"):
        dataclasses.replace(CONFIG, remat=("query",))
