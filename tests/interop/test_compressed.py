"""Quantised models as folders in the format of compressed-tensors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.kernels.quantised import QuantisedArray
from gptjax.nn import GELU, LayerNorm, LearnedPositions, RMSNorm, RoPE, TransformerConfig
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
LLAMA = TransformerConfig(
    vocab=TOKENIZER.vocab, layers=2, width=32, heads=4, kv_heads=2, hidden=48, positions=RoPE(), norm=RMSNorm(eps=1e-5)
)
GPT2 = TransformerConfig(
    vocab=TOKENIZER.vocab, layers=1, width=32, heads=4, positions=LearnedPositions(32), norm=LayerNorm(), mlp=GELU(),
    bias=True,
)  # fmt: skip
CASES = {"8 bits": (8, None, None), "4 bits": (4, 16, None), "4 bits, merged matrices": (4, 16, "phi3")}


def model(config, **options):
    params = jax.jit(config.build().init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    return gptjax.LanguageModel(config, params, TOKENIZER, context=64).quantised(**options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, (bits, group, family) in CASES.items():
        lm, folder = model(LLAMA, bits=bits, group=group, embeddings=False), tmp_path_factory.mktemp("q") / "out"
        lm.save_hf(folder, model_type=family)
        made[name] = lm, folder
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_folder_keeps_every_integer(case, folders):
    lm, folder = folders[case]
    again = gptjax.load(folder)
    assert jax.tree.structure(again.params) == jax.tree.structure(lm.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


def test_a_mesh_shards_the_integers(folders):
    lm, folder = folders["4 bits"]
    with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        shared = gptjax.load(folder, rules=dataclasses.replace(DEFAULT_RULES, vocab=None))
    up = shared.params["blocks"]["mlp"]["up"]
    assert up.codes.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    jax.tree.map(np.testing.assert_array_equal, shared.params, lm.params)
    logits = np.asarray(lm.logits(np.arange(8)[None]))
    np.testing.assert_allclose(shared.logits(np.arange(8)[None]), logits, atol=1e-4 * np.abs(logits).max())


def test_a_dtype_asks_for_floats(folders):
    lm, folder = folders["4 bits"]
    again = gptjax.load(folder, dtype="float32")
    want = jax.tree.map(np.asarray, lm.params, is_leaf=lambda x: isinstance(x, QuantisedArray))
    jax.tree.map(np.testing.assert_array_equal, again.params, want)


@pytest.mark.torch
@pytest.mark.parametrize("case", ["8 bits", "4 bits"])
def test_transformers_reads_the_same_weights(case, folders):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    lm, folder = folders[case]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    theirs(theirs.dummy_inputs["input_ids"])  # the weights are dequantised in the first forward pass
    theirs = theirs.state_dict()
    up = np.asarray(lm.params["blocks"]["mlp"]["up"])
    for layer in range(2):
        weight = theirs[f"model.layers.{layer}.mlp.up_proj.weight"].float().numpy()
        np.testing.assert_allclose(weight, up[layer].T, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LLAMA, {}, "embeddings: got model.embed_tokens.weight quantised"),
        (GPT2, {"embeddings": False}, "layout is not"),
        (dataclasses.replace(LLAMA, hidden=44), {"bits": 4, "group": 16, "embeddings": False}, "group: got several"),
    ],
)
def test_what_the_format_cannot_hold_is_named(config, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        model(config, **options).save_hf(tmp_path / "out")
