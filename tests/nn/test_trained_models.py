"""Real trained models, with the figures that other programs get from them."""

import base64
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenizers import load_tokenizer
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.nn import GELU, Block, Layer, LayerNorm, LearnedPositions, Mask, Transformer, TransformerConfig

pytestmark = pytest.mark.real


@pytest.fixture
def stories(shared):
    """stories260k: Llama architecture, grouped queries, trained on TinyStories."""
    folder = shared / "models" / "stories260k"
    c = json.loads((folder / "config.json").read_text())
    config = TransformerConfig(
        vocab=c["vocab_size"], layers=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"], hidden=c["intermediate_size"],
    )  # fmt: skip
    t = read_safetensors(folder / "model.safetensors")
    D, H = config.width, config.H

    def stack(name, *shape):
        return jnp.stack([t[f"model.layers.{i}.{name}.weight"].T.reshape(shape) for i in range(config.layers)])

    blocks = {
        "norm_1": {"scale": stack("input_layernorm", D)},
        "attention": {
            "q": stack("self_attn.q_proj", D, config.heads, H),
            "k": stack("self_attn.k_proj", D, config.K, H),
            "v": stack("self_attn.v_proj", D, config.K, H),
            "o": stack("self_attn.o_proj", config.heads, H, D),
        },
        "norm_2": {"scale": stack("post_attention_layernorm", D)},
        "mlp": {
            "gate": stack("mlp.gate_proj", D, config.F),
            "up": stack("mlp.up_proj", D, config.F),
            "down": stack("mlp.down_proj", config.F, D),
        },
    }
    params = {
        "embedding": jnp.asarray(t["model.embed_tokens.weight"]),
        "blocks": blocks,
        "norm": {"scale": jnp.asarray(t["model.norm.weight"])},
    }
    return config, params, load_tokenizer(folder / "tokenizer.model"), folder / "oracle"


def read_safetensors(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[8 + size + start : 8 + size + end], np.float32).reshape(entry["shape"])
    return tensors


def test_stories_logits_are_the_float64_oracles(stories):
    config, params, _, oracle = stories
    arrays = np.load(oracle / "logits.npz")
    for i in (0, 1, 8):
        logits, _ = Transformer(config).apply({"params": params}, jnp.asarray(arrays[f"ids_{i}"])[None])
        expected = arrays[f"logits_f64_{i}"]
        np.testing.assert_allclose(logits[0, : len(expected)], expected, atol=1e-4)


def test_stories_greedy_continuation_is_the_published_one(stories):
    config, params, tokenizer, oracle = stories
    case = json.loads((oracle / "greedy_public.json").read_text())[0]
    prompt, ids = case["prompt_ids"], case["all_ids"]
    count = min(len(ids) - len(prompt), 100)
    done = generate(
        Transformer(config), params, tokenizer, [prompt], max_tokens=count, sampling=Sampling(temperature=0)
    )
    assert list(done[0].ids) == ids[len(prompt) : len(prompt) + count]


def test_stories_loss_on_real_text(stories):
    config, params, tokenizer, oracle = stories
    expected = json.loads((oracle / "nll.json").read_text())["cs336_tinystories_sample"]
    text = (oracle / "tinystories_sample.txt").read_text()
    documents = [d.strip() for d in text.split("<|endoftext|>") if d.strip()]
    assert len(documents) == expected["stories"]
    nats = tokens = 0.0
    for document in documents:
        ids = [1, *tokenizer.encode(document)]
        logits, _ = Transformer(config).apply({"params": params}, jnp.asarray(ids[:-1])[None])
        nats -= float(jnp.take_along_axis(jax.nn.log_softmax(logits[0]), jnp.asarray(ids[1:])[:, None], 1).sum())
        tokens += len(ids) - 1
    assert tokens == expected["tokens"]
    assert nats / tokens == pytest.approx(expected["mean_nll_per_token"], abs=1e-4)


@pytest.fixture
def sorter(shared):
    """gpt_nano_sort: GPT-2 architecture with an untied head, trained to sort six digits."""
    folder = shared / "models" / "gpt_nano_sort"
    raw = json.loads((folder / "gpt-nano-sort-model.json").read_text())
    c = raw["config"]
    config = TransformerConfig(
        vocab=c["vocab_size"], layers=c["n_layer"], width=c["n_embd"], heads=c["n_head"], bias=True, tied=False,
        positions=LearnedPositions(c["block_size"]), norm=LayerNorm(), mlp=GELU(),
    )  # fmt: skip
    D, N, H = config.width, config.heads, config.H

    def tensor(name):
        entry = raw[f"{name}"]
        return np.frombuffer(base64.b64decode(entry["data"]), np.float32).reshape(entry["shape"])

    def layer(i):
        get = lambda name: tensor(f"transformer.h.{i}.{name}")  # noqa: E731
        wq, wk, wv = np.split(get("attn.c_attn.weight").T, 3, axis=1)
        bq, bk, bv = np.split(get("attn.c_attn.bias"), 3)
        heads = lambda w: w.reshape(-1, N, H)  # noqa: E731
        return {
            "norm_1": {"scale": get("ln_1.weight"), "bias": get("ln_1.bias")},
            "attention": {
                "q": heads(wq), "k": heads(wk), "v": heads(wv), "o": get("attn.c_proj.weight").T.reshape(N, H, D),
                "q_bias": bq.reshape(N, H), "k_bias": bk.reshape(N, H), "v_bias": bv.reshape(N, H),
                "o_bias": get("attn.c_proj.bias"),
            },
            "norm_2": {"scale": get("ln_2.weight"), "bias": get("ln_2.bias")},
            "mlp": {
                "up": get("mlp.c_fc.weight").T, "up_bias": get("mlp.c_fc.bias"),
                "down": get("mlp.c_proj.weight").T, "down_bias": get("mlp.c_proj.bias"),
            },
        }  # fmt: skip

    params = {
        "embedding": tensor("transformer.wte.weight"),
        "positions": {"table": tensor("transformer.wpe.weight")},
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer(i) for i in range(config.layers))),
        "norm": {"scale": tensor("transformer.ln_f.weight"), "bias": tensor("transformer.ln_f.bias")},
        "head": tensor("lm_head.weight").T,
    }
    return config, params, folder


def test_sorter_sorts_every_input(sorter):
    config, params, folder = sorter
    oracle = np.load(folder / "oracle" / "logits_all729.npz")
    forward = jax.jit(lambda tokens: Transformer(config).apply({"params": params}, tokens)[0])
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
    _, seen = Transformer(config).apply({"params": params}, ids, capture_intermediates=True)
    first = jax.tree.map(lambda p: p[0], params["blocks"])
    x = Layer(part=config.positions).apply({"params": params["positions"]}, point("tok_emb"), jnp.arange(11)[None])
    np.testing.assert_allclose(x, point("x"), atol=1e-5)
    block = Block(config=config)
    (y, _), inner = block.apply({"params": first}, x, jnp.arange(11)[None], Mask(), capture_intermediates=True)
    inner = inner["intermediates"]
    np.testing.assert_allclose(inner["norm_1"]["__call__"][0], point("ln1"), atol=1e-5)
    np.testing.assert_allclose(inner["attention"]["__call__"][0][0], point("yProj"), atol=1e-5)
    np.testing.assert_allclose(inner["norm_2"]["__call__"][0], point("ln2"), atol=1e-5)
    np.testing.assert_allclose(inner["mlp"]["__call__"][0], point("mlp"), atol=1e-5)
    np.testing.assert_allclose(y, point("mlpResid"), atol=1e-5)
    np.testing.assert_allclose(seen["intermediates"]["norm"]["__call__"][0], point("ln_f"), atol=1e-4)
