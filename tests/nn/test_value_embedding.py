"""Value embeddings against their equation."""

import jax
import numpy as np
import pytest

from gptjax.nn import MultiHeadAttention, ValueEmbedding
from gptjax.types import UserError


def test_the_equation():
    rng = np.random.default_rng(0)
    v, x = rng.normal(size=(2, 5, 3, 4)).astype(np.float32), rng.normal(size=(2, 5, 16)).astype(np.float32)
    tokens = rng.integers(0, 9, (2, 5)).astype(np.int32)
    layer = ValueEmbedding(vocab=9, gate_channels=6)
    params = jax.tree.map(lambda p: 30 * p, layer.init(jax.random.key(0), v, x, tokens))
    table, gate = np.asarray(params["params"]["embedding"]), np.asarray(params["params"]["gate"])
    opening = 3 / (1 + np.exp(-x[..., :6] @ gate))
    expected = v + opening[..., None] * table[tokens]
    # Sums of 6 products in float32.
    np.testing.assert_allclose(layer.apply(params, v, x, tokens), expected, rtol=1e-5, atol=1e-5)


def test_without_tokens_it_is_refused():
    layer = MultiHeadAttention(heads=2, head_size=8, values=ValueEmbedding(vocab=9))
    x = np.zeros((1, 2, 16), np.float32)
    with pytest.raises(UserError, match="tokens: got none"):
        layer.init(jax.random.key(0), x, np.zeros((1, 2), np.int32))
