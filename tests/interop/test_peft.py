"""Adapters in PEFT's format: there and back, and merged as `peft` merges them where it is installed."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax.distributed.parameters import parameter_info
from gptjax.interop import peft
from gptjax.interop.huggingface import load_hf, save_hf
from gptjax.interop.safetensors import Tensors
from gptjax.nn import (
    GELU,
    DoRA,
    LayerNorm,
    LayerOverrides,
    LearnedPositions,
    LoRA,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    RoPE,
    Sigmoid,
    SwiGLU,
    Transformer,
    TransformerConfig,
)
from gptjax.types import UserError

LLAMA = TransformerConfig(vocab=32, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
GPT2 = TransformerConfig(
    32, 2, 16, 4, hidden=24, positions=LearnedPositions(8), norm=LayerNorm(), mlp=GELU(), bias=True
)  # fmt: skip
ALL = ("q", "k", "v", "o", "up", "down")


def make(config, lora):
    tokens = np.arange(8, dtype=np.int32)[None]
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"]
    return params, far(lora.init(jax.random.key(1), params, parameter_info(config.build())))


def far(adapters):
    """From those that change nothing."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), adapters)


@pytest.mark.sampled
@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_written_and_read_is_the_same_model(tmp_path, config, kind, stabilised):
    lora = kind(rank=2, alpha=4, match=ALL, rank_stabilised=stabilised)
    params, adapters = make(config, lora)
    peft.write(tmp_path / "x", lora, adapters, config)
    read, there = peft.read(tmp_path / "x", config)
    assert dataclasses.replace(read, match=ALL) == lora
    if config is LLAMA:
        jax.tree.map(np.testing.assert_array_equal, there, adapters)
    same = lora.merge(params, adapters), read.merge(params, there)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), *same)


def test_names_and_shapes_are_those_of_peft(tmp_path):
    lora = DoRA(rank=2, alpha=4, match=("k", "down"))
    _, adapters = make(LLAMA, lora)
    peft.write(tmp_path / "x", lora, adapters, LLAMA)
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
    lora = LoRA(rank=2, match=("attention/q", "attention/v"))
    _, adapters = make(LLAMA, lora)
    peft.write(tmp_path / "x", lora, adapters, LLAMA)
    with pytest.raises(UserError, match="exists already"):
        peft.write(tmp_path / "x", lora, adapters, LLAMA)
    with pytest.raises(UserError, match=r"lora.bits: got 4, must be None"):
        peft.write(tmp_path / "y", dataclasses.replace(lora, bits=4), adapters, LLAMA)
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight is \(2, 16\), must be \(2, 32\)"):
        peft.read(tmp_path / "x", dataclasses.replace(LLAMA, width=32))
    with pytest.raises(UserError, match=r"tensors belong to no matrix of this model: base_model.model.model.layers.1"):
        peft.read(tmp_path / "x", dataclasses.replace(LLAMA, layers=1))
    (tmp_path / "x" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json is missing or damaged"):
        peft.read(tmp_path / "x", LLAMA)


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": SIZES,
    "gpt2": {"vocab_size": 32, "n_layer": 2, "n_embd": 16, "n_head": 4, "n_inner": 24, "n_positions": 64},
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma2": SIZES,
    "gemma3_text": SIZES,
    "olmo2": SIZES,
    "nanochat": SIZES,
    "starcoder2": SIZES,
    "falcon": {name: size for name, size in SIZES.items() if name != "head_dim"},
    "bloom": SIZES,
    "phi3": {**SIZES, "head_dim": 4},
    "cohere2": {**SIZES, "head_dim": 4},
    "stablelm": {**SIZES, "head_dim": 4, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "deepseek_v3": {
        **SIZES, "num_key_value_heads": 4, "num_hidden_layers": 3, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 12,
        "q_lora_rank": 10, "kv_lora_rank": 14, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 5,
    },
}  # fmt: skip
MERGED = ("o", "up", "down")  # queries, keys and values are interleaved
MATCH = {
    "gpt2": ALL, "nanochat": ALL, "starcoder2": ALL, "falcon": MERGED, "bloom": MERGED,
    "deepseek_v3": ("q_latent", "q", "kv_latent", "k_rope", "o"),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_itself_agrees(tmp_path, family, kind):
    """`peft` puts our adapter into the weights that we put it into, and we those that it made."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **FAMILIES[family]))
    model.save_pretrained(tmp_path / "base")
    config, params = load_hf(tmp_path / "base")
    lora = kind(rank=2, alpha=4, match=MATCH.get(family, (*ALL, "gate")))
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)),
        lora.init(jax.random.key(1), params, parameter_info(config.build())),
    )
    peft.write(tmp_path / "ours", lora, adapters, config, family)

    def merged(folder):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return theirs.PeftModel.from_pretrained(base, folder).merge_and_unload()

    def same(folder, params):
        save_hf(folder / "merged", config, params, model_type=family)
        ours = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
        for name, x in merged(folder).state_dict().items():
            torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-6)

    assert any((a != b).any() for a, b in zip(merged(tmp_path / "ours").parameters(), model.parameters(), strict=True))
    same(tmp_path / "ours", lora.merge(params, adapters))

    joined = {
        "gpt2": "c_attn",
        "phi3": "qkv_proj",
        "deepseek_v3": "kv_a_proj_with_mqa",
        "falcon": "dense",
        "bloom": "dense",
    }
    made = theirs.LoraConfig(r=3, lora_alpha=6, target_modules=[joined.get(family, "o_proj")], use_dora=kind is DoRA)
    wrapped = theirs.get_peft_model(model, made)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_()
    wrapped.save_pretrained(tmp_path / "theirs")
    read, there = peft.read(tmp_path / "theirs", config)
    same(tmp_path / "theirs", read.merge(params, there))


DEEPSEEK = TransformerConfig(
    vocab=32, layers=3, width=16, heads=4, head_size=6, hidden=12, positions=RoPE(interleaved=True),
    attention=MultiHeadLatentAttention(q_rank=10, kv_rank=14, rope_size=8, value_size=5, scale=14**-0.5),
    mlp=MixtureOfExperts(4, 2, router=Sigmoid(renormalise=True), shared=1),
    leading_layers=(LayerOverrides(mlp=SwiGLU(), hidden=24),),
)  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize(
    "match", [("kv_latent",), ("q", "o"), ("leading_0/mlp/up",), ("shared_up", "leading_0/mlp/up")]
)
def test_latent_attention_and_shared_experts(tmp_path, match):
    """Names that are of one layer's matrix and of another's experts are said in full."""
    lora = LoRA(rank=2, match=match)
    params, adapters = make(DEEPSEEK, lora)
    peft.write(tmp_path / "x", lora, adapters, DEEPSEEK)
    fields = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert ("up_proj" in fields["target_modules"]) is False
    read, there = peft.read(tmp_path / "x", DEEPSEEK)
    same = lora.merge(params, adapters), read.merge(params, there)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), *same)


@pytest.mark.parametrize("name", ["k", "v", "gate"])
def test_what_no_family_has_as_a_linear_layer_is_refused(tmp_path, name):
    """Experts lie in stacks, and latent attention's keys and values take turns."""
    mixtral = dataclasses.replace(LLAMA, mlp=MixtureOfExperts(experts=4))
    config, family = (mixtral, "mixtral") if name == "gate" else (DEEPSEEK, "deepseek_v3")
    lora = LoRA(rank=2, match=(name,))
    _, adapters = make(config, lora)
    with pytest.raises(UserError, match=rf"lora.match: got .*/{name}, which are not linear layers of {family}"):
        peft.write(tmp_path / "x", lora, adapters, config)
    assert not (tmp_path / "x").exists()


LARGE = {r".*\.layers\.1\..*q_proj": 64}
FIELDS = {
    "plain": {},
    "a scale by a regular expression": {"alpha_pattern": LARGE},
    "by alternatives": {"alpha_pattern": {"(q|v)_proj": 64}},
    "by a name's end": {"alpha_pattern": {"v_proj": 64, "q_proj": 32}},
    "ranks too": {"alpha_pattern": LARGE, "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "some layers": {"layers_to_transform": [1]},
    "without some": {"exclude_modules": r".*\.0\..*v_proj"},
    "a pattern of modules": {"target_modules": r"model\.layers\.\d\.self_attn\.(q|v)_proj"},
    "another start": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "aLoRA": {"alora_invocation_tokens": [3, 4]},
    "biases": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "a module of its own": {"modules_to_save": ["lm_head"]},
}
REFUSED = {"PiSSA", "OLoRA", "aLoRA", "biases", "all biases", "a module of its own"}


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_what_it_changes_in_peft_or_is_refused_by_name(tmp_path, name):
    """Within 1e-6 of the largest logit."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
    model.save_pretrained(tmp_path / "base")
    config, params = load_hf(tmp_path / "base")
    given = {"target_modules": ["q_proj", "v_proj"], **FIELDS[name]}
    wrapped = theirs.get_peft_model(model, theirs.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"^adapter_config.json: {'|'.join(FIELDS[name])}: got "):
            peft.read(tmp_path / "adapter", config)
        return
    lora, adapters = peft.read(tmp_path / "adapter", config)
    tokens = np.random.default_rng(0).integers(0, 32, (1, 24))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.inference_mode():
        plain = base(torch.tensor(tokens)).logits.numpy()
        want = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(config.build().apply({"params": lora.merge(params, adapters)}, tokens)[0])
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-6
    assert np.abs(plain - want).max() / np.abs(want).max() > 0.1


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_something_new", True, "adapter_config.json: use_something_new: got true, which is not supported"),
        ("kasa_config", {"beta": 1}, "adapter_config.json: kasa_config: got {"),
        ("init_lora_weights", "corda", 'adapter_config.json: init_lora_weights: got "corda", must be true or false or'),
        ("target_modules", ["v_proj"], "an adapter of model.layers.0.self_attn.q_proj, which"),
        ("rank_pattern", {"q_proj": 3}, r"q_proj.lora_A.weight is \(2, 16\), must be \(3, 16\)"),
        ("alpha_pattern", {"(q_proj": 3}, "which is no regular expression"),
        ("alpha_pattern", [3], "alpha_pattern: got .3., must be an object"),
        ("r", "2", 'r: got "2", must be a positive number'),
    ],
)
def test_a_field_that_is_unknown_or_contradicts_the_tensors_is_refused(tmp_path, field, value, message):
    lora = LoRA(rank=2, match=("q",))
    _, adapters = make(LLAMA, lora)
    peft.write(tmp_path / "x", lora, adapters, LLAMA)
    file = tmp_path / "x" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unset_in_future": None, field: value}))
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path / "x", LLAMA)
