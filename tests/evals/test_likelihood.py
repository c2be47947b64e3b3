"""Likelihoods against the forward pass of one text at a time: shared contexts, padding, batches and meshes change
nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.distributed.parameters import declared, flat, nested
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.evals import likelihood
from gptjax.evals.likelihood import Continuation, cut, score
from gptjax.nn import LearnedPositions, RecurrentConfig, TransformerConfig
from gptjax.types import UserError

CONFIG = TransformerConfig(vocab=32, layers=2, width=16, heads=4, kv_heads=2)
DRAW = np.random.default_rng(0)


def ids(n: int) -> tuple[int, ...]:
    return tuple(DRAW.integers(0, 32, n).tolist())


SHARED = [Continuation(context, ids(n)) for context in map(ids, (17, 20, 30, 30)) for n in (1, 2, 7)]
REQUESTS = [*SHARED, Continuation(ids(40), ids(2)), Continuation(ids(3), ids(21)), Continuation(ids(1), ids(1))]


def random_params(config):
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return jax.tree.map(lambda leaf: DRAW.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def one_by_one(config, params, requests) -> np.ndarray:
    """(log-probability, greedy) of each request, in float64 from the logits of the whole text."""
    texts = np.zeros((len(requests), 48), np.int32)
    for text, request in zip(texts, requests, strict=True):
        text[: len(request.context + request.ids)] = request.context + request.ids
    logits = np.asarray(jax.jit(config.build().apply)({"params": params}, texts)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for row, (context, new) in zip(logp, requests, strict=True):
        row = row[len(context) - 1 : len(context) - 1 + len(new)]
        found.append((row[np.arange(len(new)), new].sum(), (row.argmax(-1) == new).all()))
    return np.asarray(found, np.float64)


def greedy(config, params, context: tuple[int, ...], n: int) -> tuple[int, ...]:
    text = np.zeros((1, 48), np.int32)
    text[0, : len(context)] = context
    apply = jax.jit(config.build().apply)
    for i in range(len(context), len(context) + n):
        text[0, i] = np.argmax(apply({"params": params}, text)[0][0, i - 1])
    return tuple(text[0, len(context) : len(context) + n].tolist())


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_equals_the_forward_pass_of_each_text(params):
    written = greedy(CONFIG, params, SHARED[0].context, 3)
    requests = [*REQUESTS, Continuation(SHARED[0].context, written), Continuation(REQUESTS[-2].context, written)]
    expected = one_by_one(CONFIG, params, requests)
    assert expected[len(REQUESTS), 1] == 1
    found = score(CONFIG, params, requests)
    # Sums of at most 21 terms of about 5 nats, of float32 logits.
    np.testing.assert_allclose([x.logprob for x in found], expected[:, 0], rtol=1e-5)
    assert [x.greedy for x in found] == expected[:, 1].tolist()
    assert [x.tokens for x in found] == [len(request.ids) for request in requests]
    small = score(CONFIG, params, requests, batch=1)
    np.testing.assert_allclose([x.logprob for x in small], expected[:, 0], rtol=1e-5)


def test_rows_of_several_sizes_share_prefixes(params, monkeypatch):
    monkeypatch.setattr(likelihood, "ROWS_COST", 0)
    alike = [Continuation(context, ids(n)) for context in map(ids, (17, 20, 24)) for n in (1, 2, 4, 5, 7, 11)]
    requests = [*alike, Continuation(ids(20), ids(12)), Continuation(ids(22), ids(1))]
    plans = [*likelihood._plans(requests, 200, 1)]
    assert [T for _, T in plans[0].shape.rows] == [4, 8, 12, 32]  # the last is a whole text
    assert sorted(row.request for plan in plans for rows in plan.rows() for _, row in rows) == [*range(len(requests))]
    for plan in plans:
        assert plan.shape == plans[0].shape
        for (N, T), rows in zip(plan.shape.rows, plan.rows(), strict=True):
            assert len(rows) <= N
            assert all(row.length <= T for _, row in rows)
    assert len(plans) > 1
    expected = one_by_one(CONFIG, params, requests)
    for batch in (200, 4_096):
        found = score(CONFIG, params, requests, batch=batch)
        np.testing.assert_allclose([x.logprob for x in found], expected[:, 0], rtol=1e-5)
        assert [x.greedy for x in found] == expected[:, 1].tolist()


def test_a_recurrent_model_starts_from_its_state():
    config = RecurrentConfig(32, 1, 16)
    params = random_params(config)
    expected = one_by_one(config, params, REQUESTS)
    np.testing.assert_allclose([x.logprob for x in score(config, params, REQUESTS)], expected[:, 0], rtol=1e-4)


def test_a_mesh_changes_nothing(params, monkeypatch):
    monkeypatch.setattr(likelihood, "ROWS_COST", 0)
    with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        specs = declared(CONFIG.build(DEFAULT_RULES))
        place = {name: jax.device_put(x, specs[name].sharding) for name, x in flat(params).items()}
    alone, found = score(CONFIG, params, REQUESTS), score(CONFIG, nested(place), REQUESTS)
    np.testing.assert_allclose([x.logprob for x in found], [x.logprob for x in alone], rtol=1e-5)
    assert [x.greedy for x in found] == [x.greedy for x in alone]


def test_cutting_keeps_the_end_of_the_context():
    request = Continuation((1, 2, 3, 4), (5, 6))
    assert cut(request, 5) == request, "five tokens are read, the last is only predicted"
    assert cut(request, 3) == ((3, 4), (5, 6))
    assert cut(request, 2) == ((4,), (5, 6))
    with pytest.raises(UserError, match=r"continuation: got 2 tokens, must be at most 1"):
        cut(request, 1)


def test_requests_that_cannot_be_scored(params):
    limited = dataclasses.replace(CONFIG, positions=LearnedPositions(8))
    for config, request, message in (
        (CONFIG, Continuation((), (1,)), "at least one of each"),
        (CONFIG, Continuation((1,), (32,)), "must be 0 to 31"),
        (limited, Continuation(ids(5), ids(5)), "must be at most 9 in all"),
    ):
        with pytest.raises(UserError, match=f"^continuation: .*{message}"):
            score(config, params, [request])
