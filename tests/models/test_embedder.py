"""Embedders as experiments: from a file of pairs to an `EmbedderModel`."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import gptjax
from gptjax import data, evals, optim
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, global_array, use
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import EmbedderConfig, TransformerConfig
from gptjax.objectives import InfoNCE
from gptjax.types import SimilarPairs, UserError

CONFIG = EmbedderConfig(TransformerConfig(vocab=264, layers=1, width=32, heads=2))
ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant")


def test_the_loss_is_its_equation_on_a_mesh_too():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 264, (8, 12), np.int32)
    segments, positions = (
        np.repeat([[1, 2]], 6, 1).repeat(8, 0).astype(np.int32),
        np.tile(np.arange(6, dtype=np.int32), (8, 2)),
    )
    segments[6:] = 0
    batch = SimilarPairs(tokens, tokens, np.ones((8, 12), np.float32), segments, positions)
    params = jax.jit(CONFIG.build().init)(jax.random.key(0), tokens)["params"]
    objective = InfoNCE(temperature=0.1)

    def gradient(batch, model):
        return jax.jit(jax.value_and_grad(lambda p: objective(model.apply, p, batch)["loss"], has_aux=True))(params)

    (total, weight), expected = gradient(batch, CONFIG.build())
    vectors, _ = CONFIG.build().apply({"params": params}, tokens, positions, segments, documents=2)
    a, b = np.moveaxis(np.asarray(vectors, np.float64)[:6], 1, 0)
    cosines = a @ b.T / 0.1
    by_hand = (np.log(np.exp(cosines).sum(-1)) - np.diagonal(cosines)).sum()
    assert (float(total), float(weight)) == (pytest.approx(by_hand, rel=1e-4), 6)
    with use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        (there, count), grads = gradient(global_array(batch, DEFAULT_RULES), CONFIG.build(DEFAULT_RULES))
    assert (float(there), float(count)) == (pytest.approx(float(total), rel=1e-5), 6)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest), grads, expected)


@pytest.mark.alone
def test_similar_texts_are_found(tmp_path, monkeypatch):
    """An animal in a sentence, and its name in capitals with a number."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    rows = [{"source": f"{i} a {ANIMALS[i % 8]}", "target": ANIMALS[i % 8].upper()} for i in range(160)]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = data.PairsJsonl(str(path))
    adam = optim.AdamW(learning_rate=5e-3, weight_decay=0.0)
    read = data.Similar(source, length=32, batch=16)
    fit = Stage(read, InfoNCE(0.1), adam, steps=80, prompts=(), evaluations=(evals.Retrieval(source),))
    Experiment(CONFIG, data.Bytes(), {"fit": fit}).run(tmp_path / "run")
    values = json.loads((tmp_path / "run" / "report" / "fit.json").read_text())["results"][0]["values"]
    assert values["retrieval_accuracy"] > 0.9
    embedder = gptjax.load(tmp_path / "run", kind=gptjax.EmbedderModel)
    vectors = embedder.embed(["7 a cat", "CAT", "DOG"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    with pytest.raises(UserError, match="accumulate: got 2, must be 1: InfoNCE compares all sequences of a step"):
        Stage(read, InfoNCE(), adam, steps=1, accumulate=2)
