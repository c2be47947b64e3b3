"""On a mesh of devices a model writes what it writes on one device."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import data
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.inference.generate import generate, prefill
from gptjax.inference.sampling import Sampling
from gptjax.models.language_model import LanguageModel
from gptjax.nn import MixtureOfExperts, MultiHeadLatentAttention, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.optim import AdamW
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
PROMPTS = [[5], list(b"hello there"), list(b"Once upon a time"), list(b"zebra"), list(b"to be or not")]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
SIZES: Any = {"vocab": 272, "layers": 1, "width": 16, "heads": 4, "hidden": 32}
CONFIGS = {
    "grouped": TransformerConfig(**SIZES, kv_heads=2),
    "one key head": TransformerConfig(**SIZES, kv_heads=1),
    "experts": TransformerConfig(**SIZES, tie_embeddings=False, mlp=MixtureOfExperts(experts=4, top_k=2, shared=1)),
    "latent": TransformerConfig(**SIZES, attention=MultiHeadLatentAttention(kv_rank=8, rope_size=4, value_size=4)),
}


@functools.cache
def params_of(config: TransformerConfig):
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    numpy = np.random.default_rng(0)  # large weights: greedy choices are clear ones
    return jax.tree.map(lambda x: numpy.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def on_mesh(config: TransformerConfig, mesh: MeshConfig = MeshConfig(data=2, fsdp=2, tensor=2), rules=DEFAULT_RULES):
    """The same parameters, sharded over 8 devices."""
    with jax.set_mesh(mesh.make()):
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        init = config.build(dataclasses.replace(rules, batch=None)).init
        places = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
        place = lambda p, s: jax.device_put(p, jax.NamedSharding(jax.sharding.get_mesh(), s.sharding.spec))  # noqa: E731
        return jax.tree.map(place, params_of(config), places)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "count", "samples", "sampling", "mesh"),
    [
        ("grouped", 4, 1, GREEDY, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("grouped", 5, 4, DRAWN, MeshConfig(data=2, tensor=4)),  # more parts than key heads
        ("one key head", 5, 1, GREEDY, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("experts", 4, 1, DRAWN, MeshConfig(data=4, tensor=2)),
        ("latent", 5, 4, DRAWN, MeshConfig(data=2, fsdp=2, tensor=2)),
    ],
)
def test_a_mesh_changes_no_token(name, count, samples, sampling, mesh):
    """A batch of 4 or 20 sequences is sharded; one of 5, which the mesh does not divide, is replicated."""
    config = CONFIGS[name]
    write = functools.partial(
        generate, tokenizer=TOKENIZER, prompts=PROMPTS[:count], max_tokens=8, sampling=sampling, samples=samples, seed=3
    )
    expected = write(config.build(), params_of(config))
    actual = write(config.build(DEFAULT_RULES), on_mesh(config, mesh))
    for one, other in zip(expected, actual, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_the_cache_is_shared_out_as_the_rules_say():
    """Rows by those that are written, though the prompts be too few; a single key head is everywhere."""
    for name, heads in (("grouped", "tensor"), ("one key head", None)):
        config = CONFIGS[name]
        params = on_mesh(config)
        assert params["blocks"]["attention"]["q"].sharding.spec == jax.P(None, "fsdp", "tensor", None)
        with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
            for samples, rows in ((4, ("data", "fsdp")), (3, None)):
                tokens, one = np.zeros((1, 32), np.int32), np.ones(1, np.int32)
                model, seeds = config.build(DEFAULT_RULES), one.astype(np.uint32)
                state = prefill(model, params, tokens, 3 * one, seeds, samples, 48, 8, 272)
                keys = state.cache.layers[0][0]
                assert keys.sharding.spec == jax.P(rows, heads, None, None)
                assert state.tokens.sharding.is_fully_replicated


def test_a_language_model_runs_where_its_parameters_lie():
    config = CONFIGS["one key head"]
    alone = LanguageModel(config, params_of(config), TOKENIZER)
    shared = LanguageModel(config, on_mesh(config), TOKENIZER)
    logits = alone.logits(TOKENS := [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_allclose(shared.logits(TOKENS), logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(shared.logprobs("hello"), alone.logprobs("hello"), atol=1e-5)
    messages = [{"role": "user", "content": "hi"}]
    expected = alone.chat(messages, max_tokens=12, temperature=0).content
    pieces = shared.stream_chat(messages, max_tokens=12, temperature=0)
    text = ""
    for piece in pieces:
        assert jax.sharding.get_mesh().empty, "what goes on between the pieces is not of the model's mesh"
        text += piece
    assert text == expected != ""


def test_key_heads_need_not_be_cut():
    """As other axes must; the error names the field."""
    source = data.Text("text")
    stage = Stage(data.Pretrain(source, length=8, batch=8), NextToken(), AdamW(), steps=1)
    for config, tensor, field in (
        (CONFIGS["one key head"], 4, None),
        (dataclasses.replace(CONFIGS["grouped"], vocab=273), 4, "model.vocab"),
    ):
        experiment = Experiment(config, data.Bytes(), {"pretrain": stage}, MeshConfig(tensor=tensor))
        with contextlib.nullcontext() if field is None else pytest.raises(UserError, match=f"^{field}: got 273"):
            experiment.check(8)
