"""On a mesh of devices a quantised model writes what it writes on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from test_mesh import CONFIGS, DRAWN, PROMPTS, TOKENIZER, params_of

import gptjax
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.inference.engine import Request
from gptjax.types import UserError


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "bits", "group", "mesh"),
    [
        ("grouped", 8, None, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("grouped", 4, 8, MeshConfig(data=2, tensor=4)),  # more parts than key heads
        ("latent", 4, None, MeshConfig(data=2, fsdp=2, tensor=2)),
    ],
)
def test_a_mesh_changes_no_token(name, bits, group, mesh, tmp_path):
    config = dataclasses.replace(CONFIGS[name], tie_embeddings=bits == 8)
    small = gptjax.LanguageModel(config, params_of(config), TOKENIZER).quantised(bits, group)
    small.save(tmp_path / "small")
    with jax.set_mesh(mesh.make()):
        shared = gptjax.load(tmp_path / "small", rules=DEFAULT_RULES)
    down = shared.params["blocks"]["mlp"]["down"].codes  # [L, G, F, K]
    assert down.addressable_shards[0].data.size < down.size
    # Within a group sums are those of integers; those of groups, norms and softmaxes are in float32.
    logits = np.asarray(small.logits([[1, 2, 3], [4, 5, 6]]))
    np.testing.assert_allclose(shared.logits([[1, 2, 3], [4, 5, 6]]), logits, atol=1e-4 * np.abs(logits).max())
    texts = ["hello there", "Once upon a time", "zebra", "to be"]
    expected, actual = (m.generate(texts, max_tokens=8, sampling=DRAWN, seed=3) for m in (small, shared))
    assert [one.ids for one in expected] == [one.ids for one in actual]

    def written(model):
        engine = model.engine(rows=4, page=8, context=64)
        texts = [engine.submit(Request(tuple(p), max_tokens=8, sampling=DRAWN, seed=5)) for p in PROMPTS]
        engine.run()
        return [[token.id for token in text.tokens] for text in texts]

    assert written(small) == written(shared)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIGS["experts"], "mesh: got one, must be none: quantised experts"),
        (dataclasses.replace(CONFIGS["grouped"], vocab=271), "model.vocab: got 271, must be a multiple of 2"),
    ],
    ids=["experts", "vocabulary"],
)
def test_what_cannot_be_sharded_is_refused(config, message, tmp_path):
    gptjax.LanguageModel(config, params_of(config), TOKENIZER).quantised().save(tmp_path / "small")
    with jax.set_mesh(MeshConfig(data=4, tensor=2).make()), pytest.raises(UserError, match=message):
        gptjax.load(tmp_path / "small", rules=DEFAULT_RULES)
