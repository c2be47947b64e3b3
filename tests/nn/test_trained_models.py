"""Real trained models, with the figures that other programs get from them."""

import base64
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.interop.huggingface import from_tensors
from gptjax.nn import Context, Mask

pytestmark = pytest.mark.real


@pytest.fixture
def stories(shared):
    """stories260k: Llama architecture, grouped queries, trained on TinyStories."""
    folder = shared / "models" / "stories260k"
    return gptjax.load(folder), folder / "oracle"


def test_stories_logits_are_the_float64_oracles(stories):
    lm, oracle = stories
    arrays = np.load(oracle / "logits.npz")
    for i in (0, 1, 8):
        logits = lm.logits(arrays[f"ids_{i}"][None])
        expected = arrays[f"logits_f64_{i}"]
        np.testing.assert_allclose(logits[0, : len(expected)], expected, atol=1e-4)


def test_stories_greedy_continuation_is_the_published_one(stories):
    lm, oracle = stories
    case = json.loads((oracle / "greedy_public.json").read_text())[0]
    prompt, ids = case["prompt_ids"], case["all_ids"]
    count = min(len(ids) - len(prompt), 100)
    done = generate(lm.config.build(), lm.params, lm.tokenizer, [prompt], count, Sampling(temperature=0))
    assert list(done[0].ids) == ids[len(prompt) : len(prompt) + count]


def test_stories_loss_on_real_text(stories):
    lm, oracle = stories
    expected = json.loads((oracle / "nll.json").read_text())["cs336_tinystories_sample"]
    text = (oracle / "tinystories_sample.txt").read_text()
    documents = [d.strip() for d in text.split("<|endoftext|>") if d.strip()]
    assert len(documents) == expected["stories"]
    nats = tokens = 0.0
    for document in documents:
        logprobs = lm.logprobs(document)
        nats -= float(logprobs.sum())
        tokens += len(logprobs)
    assert tokens == expected["tokens"]
    assert nats / tokens == pytest.approx(expected["mean_nll_per_token"], abs=1e-4)


@pytest.fixture
def sorter(shared):
    """gpt_nano_sort: GPT-2 architecture with an untied head, trained to sort six digits."""
    folder = shared / "models" / "gpt_nano_sort"
    raw = json.loads((folder / "gpt-nano-sort-model.json").read_text())
    c = raw.pop("config")
    known = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    fields = {**c, **known, "n_positions": c["block_size"], "tie_word_embeddings": False}
    tensors = {
        name: np.frombuffer(base64.b64decode(entry["data"]), np.float32).reshape(entry["shape"])
        for name, entry in raw.items()
    }
    # Its linear layers are [out, in], unlike GPT-2's own.
    linear = {name for name in tensors if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    tensors |= {name: np.ascontiguousarray(tensors[name].T) for name in linear}
    config, params = from_tensors(fields, tensors)
    return config, params, folder


def test_sorter_sorts_every_input(sorter):
    config, params, folder = sorter
    oracle = np.load(folder / "oracle" / "logits_all729.npz")
    forward = jax.jit(lambda tokens: config.build().apply({"params": params}, tokens)[0])
    np.testing.assert_allclose(forward(oracle["inputs"].astype(np.int32)), oracle["logits_f64"], atol=1e-3, rtol=1e-4)
    digits = oracle["inputs"][:, :6].astype(np.int32)
    row = jnp.asarray(digits)
    for _ in range(6):
        tokens = jnp.pad(row, ((0, 0), (0, 11 - row.shape[1])))[:, :11]
        row = jnp.concatenate([row, forward(tokens)[:, row.shape[1] - 1].argmax(-1)[:, None]], 1)
    np.testing.assert_array_equal(row[:, 6:], np.sort(digits, axis=1))


def test_first_block_of_the_sorter_is_pytorchs(sorter):
    """Every activation that PyTorch recorded at the first block's inner points."""
    config, params, folder = sorter
    recorded = json.loads((folder / "gpt-nano-sort-t0-partials.json").read_text())

    def point(name):
        entry = recorded[name]
        kind = np.int64 if "int" in entry["dtype"] else np.float32
        return np.frombuffer(base64.b64decode(entry["data"]), kind).reshape(entry["shape"])

    ids = jnp.asarray(point("idx").astype(np.int32))
    _, seen = config.build().apply({"params": params}, ids, mutable=["intermediates"])
    first = jax.tree.map(lambda p: p[0], params["blocks"])
    x = config.positions.apply({"params": params["positions"]}, point("tok_emb"), jnp.arange(11)[None])
    np.testing.assert_allclose(x, point("x"), atol=1e-5)
    block = config.stack().blocks[0]
    context = Context(jnp.arange(11)[None], Mask())
    (y, _), inner = block.apply({"params": first}, x, context, mutable=["intermediates"])
    inner = inner["intermediates"]
    np.testing.assert_allclose(inner["norm_1_output"], point("ln1"), atol=1e-5)
    np.testing.assert_allclose(inner["attention_output"], point("yProj"), atol=1e-5)
    np.testing.assert_allclose(inner["norm_2_output"], point("ln2"), atol=1e-5)
    np.testing.assert_allclose(inner["mlp_output"], point("mlp"), atol=1e-5)
    np.testing.assert_allclose(y, point("mlpResid"), atol=1e-5)
    np.testing.assert_allclose(seen["intermediates"]["norm_output"], point("ln_f"), atol=1e-4)
