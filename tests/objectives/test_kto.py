"""KTO's loss and gradient equal trl's, its baseline is that of the whole step, and its batches say which reply is
desirable."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import data
from gptjax.distributed.sharding import MeshConfig, use
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import KTO
from gptjax.objectives.kto import mismatched
from gptjax.types import LabelledReplies, UserError

CONFIG = TransformerConfig(vocab=32, layers=1, width=16, heads=2, dropout=0.5)
MODEL = Transformer(CONFIG)
B, T = 8, 20
ABSENT = (2, 7)
"""Sequences of padding."""


def conversations(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompt and reply of each sequence."""
    draw = np.random.default_rng(seed)
    sizes = [(p, draw.integers(1, T + 1 - p)) for p in draw.integers(1, 15, B)]
    return [(list(draw.integers(1, 32, p)), list(draw.integers(1, 32, r))) for p, r in sizes]


def batch_of(said: list[tuple[list[int], list[int]]]) -> LabelledReplies:
    """The batch of prompts and replies, cut off at T, as data make it."""
    tokens, targets, segments, positions = np.zeros((4, B, T), np.int32)
    weights, desirable = np.zeros((B, T), np.float32), np.arange(B) % 3 > 0
    for row, (prompt, reply) in enumerate(said):
        if row in ABSENT:
            continue
        ids = np.array(prompt + reply)
        n = min(len(ids), T)
        tokens[row, :n], segments[row, :n], positions[row, :n] = ids[:n], 1, np.arange(n)
        known = min(len(ids) - 1, T)
        targets[row, len(prompt) - 1 : known] = ids[len(prompt) : known + 1]
        weights[row, len(prompt) - 1 : known] = 1
    desirable = np.where(np.isin(np.arange(B), ABSENT), 0, desirable).astype(np.float32)
    return LabelledReplies(tokens, targets, weights, segments, positions, desirable)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    made = [jax.jit(MODEL.init)(key, jnp.zeros((1, 4), jnp.int32))["params"] for key in keys]
    return [jax.tree.map(lambda x: x * 2, one) for one in made]


def test_prompts_are_paired_with_the_replies_before_them():
    said = conversations()
    present = [row for row in range(B) if row not in ABSENT]
    before = dict(zip(present, [present[-1], *present], strict=False))
    expected = batch_of([(prompt, said[before.get(row, row)][1]) for row, (prompt, _) in enumerate(said)])
    found = mismatched(batch_of(said))
    assert max(len(p) + len(said[before[r]][1]) for r, (p, _) in enumerate(said) if r in before) > T
    for name in ("tokens", "weights", "segments", "positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_array_equal(found.targets * found.weights, expected.targets * expected.weights)


def test_a_reply_without_another_has_no_baseline(params):
    whole = batch_of(conversations())
    alone = jax.tree.map(lambda x: np.where(np.arange(B).reshape(-1, *[1] * (x.ndim - 1)) == 1, x, 0), whole)
    assert not mismatched(alone).weights.any()
    assert not KTO().prepare(MODEL.apply, params[0], alone, params[1]).baseline.any()


def test_a_stage_begins_where_nothing_is_preferred(params):
    objective = KTO(desirable_weight=1.5)
    batch = objective.prepare(MODEL.apply, params[0], batch_of(conversations()), params[0])
    metrics = objective(MODEL.apply, params[0], batch, jax.random.key(0), params[0])
    good = float(np.sum(batch.desirable))
    assert float(metrics["loss"][0]) == pytest.approx(0.5 * (1.5 * good + (6 - good)), rel=1e-6)
    assert metrics["kl"][0] == 0
    assert metrics["accuracy"] == (3, 6)


def test_a_step_in_parts_and_on_a_mesh_has_the_same_gradient(params):
    objective, whole = KTO(0.5, 1.3, 0.8), batch_of(conversations())
    worse = jax.tree.map(lambda x: x * 1.5, params[0])

    def prepared(batch, model=MODEL, parts=1):
        return jax.jit(lambda *a: objective.prepare(model.apply, *a, parts=parts))(params[1], batch, worse)

    @functools.cache
    def gradient(model):
        def loss(trained, part, frozen):
            return objective(model.apply, trained, part, None, frozen)["loss"]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    ready = prepared(whole)
    assert ready.baseline[0] > 0, "without a baseline the test would show little"
    np.testing.assert_allclose(prepared(whole, parts=4).baseline, ready.baseline, rtol=1e-5)
    (total, weight), expected = gradient(MODEL)(params[1], ready, worse)
    tolerance = {"rtol": 2e-5, "atol": 1e-5 * max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))}
    for cuts in ((0, 2, 8), (0, 2, 4, 6, 8)):
        parts = [jax.tree.map(lambda x: x[a:b], ready) for a, b in itertools.pairwise(cuts)]  # noqa: B023
        made = [gradient(MODEL)(params[1], part, worse) for part in parts]
        assert sum(float(part[0][1]) for part in made) == float(weight) == 6
        added = jax.tree.map(lambda *g: sum(g), *(part[1] for part in made))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), added, expected)
    with use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        sharded = Transformer(CONFIG)
        spread = jax.tree.map(lambda x: jax.device_put(x, sharded.rules(*["batch", None][: x.ndim])), whole)
        there = prepared(spread, sharded)
        np.testing.assert_allclose(there.baseline, ready.baseline, rtol=1e-5)
        (value, count), grads = gradient(sharded)(params[1], there, worse)
    assert (float(value), float(count)) == (pytest.approx(float(total), rel=1e-5), float(weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected)


def test_losses_are_those_that_torchtune_publishes():
    """Values of its tests/torchtune/rlhf/loss/test_dpo_loss.py (BSD-3)."""
    ratios = jnp.array([0.0, 0.1, -0.9, 0.0, -9.9, -20.9])
    losses = KTO(0.1).loss(ratios, jnp.zeros(6), jnp.repeat(jnp.array([1.0, 0.0]), 3))
    np.testing.assert_allclose(losses, [0.5, 0.4975, 0.5225, 0.5, 0.2709, 0.1101], atol=1e-4)


BYTES = data.Bytes().build(iter(())).with_specials(data.CHAT_SPECIALS)


def test_labels_are_those_of_the_file(tmp_path, caplog):
    path = tmp_path / "replies.jsonl"
    rows = [{"prompt": f"q{i}", "completion": "so" * i, "label": i % 2 == 0} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    read = data.UnpairedPreferences(data.UnpairedPreferencesJsonl(str(path), 0.0), length=64, batch=4)
    found = labels(read, tmp_path)
    assert found == {"soso": 1.0, "so" * 4: 1.0, "so": 0.0, "so" * 3: 0.0}
    assert "left out 1 replies with nothing in them" in caplog.text
    path.write_text(json.dumps(rows[1] | {"label": "yes"}))
    with pytest.raises(UserError, match=r"replies\.jsonl:1: label: got 'yes', must be true or false"):
        list(read.source.documents("train"))
    with pytest.raises(UserError, match="batch: got 1"):
        data.UnpairedPreferences(read.source, length=64, batch=1)


def test_a_pair_is_a_desirable_and_an_undesirable_reply(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}))
    source = data.PreferencesJsonl(str(tmp_path / "pairs.jsonl"), validation=0.0)
    assert labels(data.UnpairedPreferences(source, length=64, batch=2), tmp_path) == {"yes": 1.0, "no": 0.0}


def labels(read: data.UnpairedPreferences, folder) -> dict[str, float]:
    """Targets of each sequence and its label."""
    found = {}
    for batch in read.evaluation(BYTES, "train", folder):
        for row in np.flatnonzero(batch.segments[:, 0]):
            targets = batch.targets[row][batch.weights[row] > 0]
            assert targets[-1] == BYTES.specials["<|end|>"]
            found[BYTES.decode(targets[:-1])] = float(batch.desirable[row])
    return found
