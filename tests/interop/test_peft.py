"""Adapters in PEFT's format: there and back, and merged as `peft` merges them where it is installed."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax.interop import peft
from gptjax.interop.safetensors import Tensors
from gptjax.nn import GELU, DoRA, LayerNorm, LearnedPositions, LoRA, Transformer, TransformerConfig
from gptjax.types import UserError

LLAMA = TransformerConfig(vocab=32, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
GPT2 = TransformerConfig(
    32, 2, 16, 4, hidden=24, positions=LearnedPositions(8), norm=LayerNorm(), mlp=GELU(), bias=True
)  # fmt: skip
ALL = ("q", "k", "v", "o", "up", "down")


def make(config, lora):
    tokens = np.arange(8, dtype=np.int32)[None]
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), lora.init(jax.random.key(1), params))
    return params, jax.tree.map(np.float32, adapters)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(("config", "modules"), [(LLAMA, peft.LLAMA), (GPT2, peft.GPT2)], ids=["llama", "gpt2"])
def test_written_and_read_is_the_same_model(tmp_path, config, modules, kind, stabilised):
    lora = kind(rank=2, alpha=4, match=ALL, rank_stabilised=stabilised)
    params, adapters = make(config, lora)
    peft.write(tmp_path / "x", lora, adapters, config, modules)
    read, there = peft.read(tmp_path / "x", config, modules)
    assert dataclasses.replace(read, match=ALL) == lora
    if modules is peft.LLAMA:
        jax.tree.map(np.testing.assert_array_equal, there, adapters)
    same = lora.merge(params, adapters), read.merge(params, there)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), *same)


def test_names_and_shapes_are_those_of_peft(tmp_path):
    lora = DoRA(rank=2, alpha=4, match=("k", "down"))
    _, adapters = make(LLAMA, lora)
    peft.write(tmp_path / "x", lora, adapters, LLAMA, peft.LLAMA)
    shapes = {name: x.shape for name, x in Tensors(tmp_path / "x" / "adapter_model.safetensors").shapes.items()}
    k, down = ("base_model.model.model.layers.1." + name for name in ("self_attn.k_proj", "mlp.down_proj"))
    assert shapes[f"{k}.lora_A.weight"] == (2, 16)
    assert shapes[f"{k}.lora_B.weight"] == (8, 2)
    assert shapes[f"{k}.lora_magnitude_vector"] == (8,)
    assert shapes[f"{down}.lora_A.weight"] == (2, 24)
    assert len(shapes) == 12
    fields = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["down_proj", "k_proj"]


def test_what_does_not_fit_is_refused(tmp_path):
    lora = LoRA(rank=2)
    _, adapters = make(LLAMA, lora)
    peft.write(tmp_path / "x", lora, adapters, LLAMA, peft.LLAMA)
    with pytest.raises(UserError, match="exists already"):
        peft.write(tmp_path / "x", lora, adapters, LLAMA, peft.LLAMA)
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight is \(2, 16\), must be \(2, 32\)"):
        peft.read(tmp_path / "x", dataclasses.replace(LLAMA, width=32), peft.LLAMA)
    with pytest.raises(UserError, match=r"tensors are of no matrix in this model: base_model.model.model.layers.1"):
        peft.read(tmp_path / "x", dataclasses.replace(LLAMA, layers=1), peft.LLAMA)
    (tmp_path / "x" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json is missing or damaged"):
        peft.read(tmp_path / "x", LLAMA, peft.LLAMA)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_itself_agrees(tmp_path, family, kind):
    """Both merge the same adapters into the same weights."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config, modules = (LLAMA, peft.LLAMA) if family == "llama" else (GPT2, peft.GPT2)
    lora = kind(rank=2, alpha=4, match=ALL)
    params, adapters = make(config, lora)
    if kind is DoRA:  # only a magnitude that is far from the norm shows
        adapters = jax.tree_util.tree_map_with_path(lambda p, x: x * 1.5 if p[-1].key == "magnitude" else x, adapters)
    if family == "llama":
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "hidden_size": 16}
        made = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
        model = transformers.LlamaForCausalLM(made)
    else:
        made = transformers.GPT2Config(vocab_size=32, n_layer=2, n_embd=16, n_head=4, n_inner=24, n_positions=8)
        model = transformers.GPT2LMHeadModel(made)
    block, named = params["blocks"], dict(model.named_parameters())

    def weight(tree, layer, parts):
        matrices = [tree[part.split("/")[0]][part.split("/")[1]][layer] for part in parts]
        inputs = 2 if parts == ("attention/o",) else 1
        whole = [np.reshape(w, (int(np.prod(w.shape[:inputs])), -1)) for w in matrices]
        return np.concatenate(whole, 1)

    cases = [(layer, name.replace("{L}", str(layer)), parts) for layer in (0, 1) for name, parts in modules.items()]
    with torch.no_grad():
        for layer, name, parts in cases:
            w = weight(block, layer, parts)
            named[f"{name}.weight"].copy_(torch.tensor(w if family == "gpt2" else w.T))
    peft.write(tmp_path / "x", lora, adapters, config, modules)
    merged = theirs.PeftModel.from_pretrained(model, tmp_path / "x").merge_and_unload()
    ours = lora.merge(params, adapters)["blocks"]
    after = dict(merged.named_parameters())
    for layer, name, parts in cases:
        got = after[f"{name}.weight"].detach().numpy()
        w = weight(ours, layer, parts)
        np.testing.assert_allclose(w, got if family == "gpt2" else got.T, rtol=1e-5, atol=1e-6)

    made = theirs.LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj" if family == "llama" else "c_attn"], use_dora=kind is DoRA
    )
    wrapped = theirs.get_peft_model(merged, made)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_()
    wrapped.save_pretrained(tmp_path / "theirs")
    read, there = peft.read(tmp_path / "theirs", config, modules)
    again = read.merge(lora.merge(params, adapters), there)["blocks"]
    after = dict(wrapped.merge_and_unload().named_parameters())
    for layer, name, parts in cases:
        got = after[f"{name}.weight"].detach().numpy()
        w = weight(again, layer, parts)
        np.testing.assert_allclose(w, got if family == "gpt2" else got.T, rtol=1e-4, atol=1e-5)
