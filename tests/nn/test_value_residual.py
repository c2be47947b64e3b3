"""Value residuals against their equation, in a stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import apply, drawn

from gptjax.nn import (
    LayerOverrides,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    MultiTokenConfig,
    Transformer,
    TransformerConfig,
    ValueResidual,
    activations,
)
from gptjax.types import UserError

CONFIG = TransformerConfig(32, layers=3, width=16, heads=4, attention=MultiHeadAttention(values=ValueResidual()))
TOKENS = jax.random.randint(jax.random.key(7), (2, 6), 0, 32)


@pytest.mark.parametrize("first", [(), (LayerOverrides(window=3),)], ids=["scanned", "apart"])
def test_the_equation(first):
    """In a row of one token attention is its values, and o of them what it puts out."""
    config = dataclasses.replace(CONFIG, leading_layers=first)
    model = Transformer(config)
    params = drawn(model)
    blocks = config.unstack(params)["blocks"]
    for i, own in enumerate((0.9, 0.2, 0.7)):
        blocks[f"layer_{i}"]["attention"]["values_scale"] = jnp.float32(own)
    found = activations(model, {**params, "blocks": blocks}, TOKENS[:, :1])
    values = [
        np.einsum("BTD,DKH->BTKH", found[f"layer_{i}/norm_1"], blocks[f"layer_{i}"]["attention"]["v"]) for i in range(3)
    ]
    for i, own in enumerate((1.0, 0.2, 0.7)):  # the first layer's is of no use
        mixed = own * values[i] + (1 - own) * values[0]
        expected = np.einsum("BTKH,KHD->BTD", mixed, blocks[f"layer_{i}"]["attention"]["o"])
        # Sums of 16 float32 products.
        np.testing.assert_allclose(found[f"layer_{i}/attention"], expected, rtol=2e-5, atol=2e-5)


def test_the_scan_computes_what_the_layers_do_one_by_one():
    model = Transformer(CONFIG)
    params = drawn(model)
    logits, _ = apply(model, params, TOKENS)
    alone, _ = apply(model, CONFIG.unstack(params), TOKENS)
    np.testing.assert_allclose(logits, alone, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("first", "line"),
    [
        (
            LayerOverrides(attention=MultiHeadLatentAttention(rope_size=2)),
            r"model\.leading_layers: got MultiHeadLatentAttention",
        ),
        (LayerOverrides(attention=MultiHeadAttention(kv_heads=2)), r"model\.attention\.kv_heads: got values \(4, 4\)"),
    ],
)
def test_a_first_layer_with_other_values_is_refused(first, line):
    model = Transformer(dataclasses.replace(CONFIG, leading_layers=(first,)))
    with pytest.raises(UserError, match=line):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def test_heads_that_are_in_no_stack_are_refused():
    with pytest.raises(UserError, match=r"model\.attention\.values: got ValueResidual"):
        MultiTokenConfig(32, 1, 16, 4, attention=CONFIG.attention)
