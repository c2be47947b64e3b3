"""The loss of extractive question answering is its equation, and has the same gradient however a step is split."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, use
from gptjax.nn import EncoderConfig, SpanExtractorConfig
from gptjax.objectives import SpanExtraction
from gptjax.types import AnswerSpans

CONFIG = SpanExtractorConfig(EncoderConfig(vocab=32, layers=1, width=16, heads=2, token_types=2))
B, T = 8, 16


def batch(empty: int) -> AnswerSpans:
    """Passages of all lengths, some without the answer, and some sequences of padding alone."""
    draw = np.random.default_rng(0)
    sizes = np.where(np.arange(B) < B - empty, draw.integers(8, T + 1, B), 0)
    inside = np.arange(T) < sizes[:, None]
    positions = (np.arange(T, dtype=np.int32) * inside).astype(np.int32)
    labels = np.array([[3, *sorted(draw.integers(3, 8, 2))] if i % 3 else [3, 0, 0] for i in range(B)], np.int32)
    labels[sizes == 0] = -1
    tokens = draw.integers(0, 32, (B, T), np.int32)
    return AnswerSpans(tokens, tokens, np.ones((B, T), np.float32), inside.astype(np.int32), positions, labels)


def test_the_loss_is_the_mean_of_both_cross_entropies():
    logits = np.random.default_rng(0).normal(size=(B, T, 2)).astype(np.float32)
    given, spans = {}, batch(2)

    def apply(*_, token_types, **__):
        given["types"] = token_types
        return (logits, None), {}

    found = SpanExtraction()(apply, {}, spans)
    expected, right = [], 0
    for row in range(B - 2):
        scores = logits[row, : spans.segments[row].sum()]
        at = spans.labels[row, 1:]
        likely = np.exp(scores) / np.exp(scores).sum(0)
        expected.append(-(np.log(likely[at[0], 0]) + np.log(likely[at[1], 1])) / 2)
        right += np.array_equal(scores.argmax(0), at)
    np.testing.assert_allclose(found["loss"][0], np.sum(expected), rtol=1e-6)
    assert (float(found["loss"][1]), float(found["accuracy"][0])) == (B - 2, right)
    np.testing.assert_array_equal(given["types"], (np.arange(T) >= 3) & (spans.segments > 0))


def test_a_step_in_parts_and_on_a_mesh_has_the_same_gradient():
    whole, objective, model = batch(3), SpanExtraction(), CONFIG.build()
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0), whole.tokens)["params"])

    @functools.cache
    def gradient(model):
        return jax.jit(jax.value_and_grad(lambda p, part: objective(model.apply, p, part)["loss"], has_aux=True))

    (total, weight), expected = gradient(model)(params, whole)
    assert float(weight) == B - 3, "a sequence of padding does not count"
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))}
    for cuts in ((0, 2, 8), (0, 2, 4, 6, 8)):
        parts = [jax.tree.map(lambda x: x[a:b], whole) for a, b in itertools.pairwise(cuts)]  # noqa: B023
        made = [gradient(model)(params, part) for part in parts]
        added = jax.tree.map(lambda *g: sum(g), *(part[1] for part in made))
        assert sum(float(part[0][0]) for part in made) == pytest.approx(float(total), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), added, expected)
    with use(MeshConfig(data=2, context=2, tensor=2).make()):
        (there, count), grads = gradient(CONFIG.build(DEFAULT_RULES))(params, whole)
    assert (float(there), float(count)) == (pytest.approx(float(total), rel=1e-6), float(weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(expected))
