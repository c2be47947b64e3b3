"""Laws of the heads that say something of a whole text, over a decoder and an encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import apply, drawn, placed

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import (
    Backbone,
    Classifier,
    ClassifierConfig,
    Embedder,
    EncoderConfig,
    First,
    Last,
    Mean,
    Transformer,
    TransformerConfig,
)
from gptjax.objectives import Classification
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Labelled

SIZES = {"vocab": 32, "layers": 2, "width": 16, "heads": 4}
DECODER, ENCODER = TransformerConfig(**SIZES, tie_embeddings=False), EncoderConfig(**SIZES)
TOKENS = jax.random.randint(jax.random.key(7), (4, 12), 0, 32)
# Values of size 1 after 2 layers of sums of 16 to 48 float32 products.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("pooling", [First(), Last(), Mean()])
def test_pooling_takes_what_it_says(pooling):
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 1]])
    got = np.asarray(pooling(x, segments, 2))
    take = {First: lambda part: part[0], Last: lambda part: part[-1], Mean: lambda part: part.mean(0)}[type(pooling)]
    for row, document, part in ((0, 0, slice(0, 3)), (0, 1, slice(3, 5)), (1, 0, slice(1, 6))):
        np.testing.assert_allclose(got[row, document], take(x[row, part]), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[1, 1], 0)


@pytest.mark.parametrize("config", [DECODER, ENCODER], ids=["decoder", "encoder"])
@pytest.mark.parametrize("pooling", [First(), Mean(), Last()])
def test_packed_texts_are_classified_as_each_alone(config, pooling):
    model = Classifier(ClassifierConfig(config, 3, pooling))
    params = drawn(model)
    packed = jnp.concatenate([TOKENS[:1, :6], TOKENS[1:2, :4], TOKENS[2:3, :2]], 1)
    positions = jnp.concatenate([jnp.arange(6), jnp.arange(4), jnp.arange(2)])[None]
    segments = jnp.array([[1] * 6 + [2] * 4 + [0] * 2])
    together, _ = apply(model, params, packed, positions, segments, documents=2)
    first, _ = apply(model, params, TOKENS[:1, :6])
    second, _ = apply(model, params, TOKENS[1:2, :4])
    np.testing.assert_allclose(together, jnp.concatenate([first, second], 1), **CLOSE)
    assert jnp.abs(first - second).max() > 1e-4


def test_a_language_models_parameters_fit():
    """The backbone's hidden states are what the language model's head reads; an embedder pools them."""
    params = drawn(Transformer(DECODER))
    x, _ = apply(Backbone(DECODER), params, TOKENS)
    logits, _ = apply(Transformer(DECODER), params, TOKENS)
    np.testing.assert_allclose(x @ params["head"], logits, **CLOSE)
    fresh = drawn(Classifier(ClassifierConfig(DECODER, 3)))
    assert fresh.keys() - params.keys() == {"classifier"}
    vectors = apply(Embedder(DECODER, pooling=Last()), params, TOKENS)[0][:, 0]
    expected = x[:, -1] / jnp.linalg.norm(x[:, -1], axis=-1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, **CLOSE)


def test_a_mesh_changes_nothing():
    config = ClassifierConfig(ENCODER, 3, Mean())
    model = Classifier(config)
    params = drawn(model)
    expected, _ = apply(model, params, TOKENS)
    with sharding.use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        sharded = Classifier(config, DEFAULT_RULES)
        tokens = sharding.global_array(np.asarray(TOKENS), DEFAULT_RULES)
        params = placed(sharded, params, tokens)
        found = [apply(sharded, params, tokens, None, segments)[0] for segments in (None, jnp.ones_like(tokens))]
    for logits in found:
        np.testing.assert_allclose(logits, expected, **CLOSE)


def test_classes_are_learned():
    """Classify texts by the presence of a 1, with two texts per sequence and a few without a label."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 32, (32, 12), dtype=np.int32)
    labels = rng.integers(0, 2, (32, 2), dtype=np.int32)
    tokens[labels[:, 0] == 1, 3] = tokens[labels[:, 1] == 1, 8] = 1
    labels[::8, 1] = -1
    segments = np.repeat(np.array([[1, 2]], np.int32), 6, 1).repeat(32, 0)
    positions = np.tile(np.arange(6, dtype=np.int32), (32, 2))
    batch = Labelled(tokens, tokens, np.ones((32, 12), np.float32), segments, positions, labels)
    model = Classifier(ClassifierConfig(DECODER, 2, Mean()))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 160))  # at a constant rate one text flips now and then
    state = train_state.create(jax.jit(model.init)(jax.random.key(0), tokens)["params"], optimizer, jax.random.key(1))
    step = make_step(Classification(), model.apply, optimizer)
    for _ in range(160):
        state, metrics = step(state, batch)
    assert metrics["accuracy"][1] == 60
    assert metrics["accuracy"][0] == 60
    assert metrics["loss"][0] / 60 < 0.2
