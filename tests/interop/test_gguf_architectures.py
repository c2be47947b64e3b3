"""Every architecture of a GGUF file: what the real llama.cpp computes with our random models, we compute too."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import DEEPSEEK, EXPERTS, GROUPED, LLAMA3, LOCAL_AND_GLOBAL, LONGROPE, YARN
from family_cases import GEMMA as GEMMA_ODD
from test_llama_cpp import ranks

import gptjax
from gptjax.interop.families import FAMILIES, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL
from gptjax.interop.gguf.model import describe
from gptjax.interop.huggingface import to_tensors
from gptjax.models.language_model import LanguageModel
from gptjax.types import UserError

COMMON = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 256}
GEMMA = {**GEMMA_ODD, "query_pre_attn_scalar": 16}
PHI = {**GROUPED, "sliding_window": None, "rope_parameters": {**LONGROPE, "rope_theta": 1e4, "factor": 4.0}}
GPT_OSS = {**EXPERTS, "head_dim": 16, "sliding_window": 5}
V3 = {**DEEPSEEK, "routed_scaling_factor": 2.5}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "layer_norm_epsilon": 1e-5}
CASES = {
    "llama": {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama 3": {**GROUPED, "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}},
    "mistral": {**GROUPED, "sliding_window": 64},
    "mixtral": EXPERTS,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16, "rope_parameters": YARN},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "gpt2": {**GPT2, "activation_function": "gelu_new"},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7, "rope_parameters": LOCAL_AND_GLOBAL},
    "olmo2": {**GROUPED, "tie_word_embeddings": False},
    "phi3": {**GROUPED, "sliding_window": 64, "partial_rotary_factor": 0.75},
    "phi3 short": {**PHI, "original_max_position_embeddings": 256},
    "phi3 long": {**PHI, "original_max_position_embeddings": 64},
    "gpt_oss": {**GPT_OSS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt_oss local": {**GPT_OSS, "layer_types": [LOCAL] * 3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "gpt_oss thirds": {**GPT_OSS, "layer_types": [LOCAL, LOCAL, GLOBAL], "rope_parameters": {"rope_type": "default"}},
    "deepseek_v3": V3,
    "deepseek_v3 yarn": {**V3, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
}


def config_of(family, fields):
    table = next(table for table in FAMILIES if table.model_type == family)
    return table.read(Fields({**COMMON, **fields}))


def random_model(case, folder) -> LanguageModel:
    tokenizer = ranks(folder)
    config = config_of(case.split()[0], {**CASES[case], "vocab_size": tokenizer.vocab + 3})
    if case == "phi3 long":
        config = config.for_context_length(256)
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), jnp.float32), shapes)
    for name in {"embedding", "head"} & params.keys():  # llama.cpp's server leaves out tokens that are no whole text
        rows = jnp.asarray([i < 128 or 256 <= i < 264 for i in range(config.vocab)])
        params[name] *= rows[:, None] if name == "embedding" else rows
    return LanguageModel(config, params, tokenizer, context=256)


def asked(file, **questions):
    """Answers of llama.cpp, in a process of its own."""
    questions = {"texts": [], "prompts": [], "talks": [], "tokens": 24, **questions}
    program = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(file)]
    done = subprocess.run(program, input=json.dumps(questions), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3_000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.sampled
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="asks llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, tmp_path):
    """To float32's rounding; where there is a GELU, which ggml takes from a table of float16, to float16's."""
    lm = random_model(case, tmp_path)
    lm.save_gguf(tmp_path / "model.gguf", "f32")
    prompt = np.random.default_rng(1).integers(0, 128, 24).tolist()
    (places,) = asked(tmp_path / "model.gguf", likely=[prompt], probabilities=10)["likely"]
    chosen = [place[0][0] for place in places]
    assert len(chosen) == 24
    logits = np.asarray(lm.logits([[*prompt, *chosen]]))[0, 23:-1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    worst = max(abs(value - expected[i, token]) for i, place in enumerate(places) for token, value in place)
    print(f"\n{case}: {worst / np.abs(logits).max():.1e}")
    assert expected.argmax(-1).tolist() == chosen
    assert worst < (2**-11 if case.startswith(("gpt2", "gemma")) else 1e-4) * np.abs(logits).max()


BOUNDS = {**GPT_OSS, "rope_parameters": {**YARN, "truncate": False}}


def test_rounded_bounds_are_said():
    """YaRN in gpt-oss: llama.cpp rounds bounds that the published models do not."""
    with pytest.warns(UserWarning, match="got truncate False, which llama.cpp lacks: it rounds YaRN's bounds"):
        described("gpt_oss", BOUNDS)


REFUSED = {
    "query_pre_attn_scalar": ("gemma2", {"query_pre_attn_scalar": 24}, r"attention.scale: 0.204\d* → 0.25"),
    "layer_types": ("gemma2", {"layer_types": [GLOBAL, LOCAL, LOCAL]}, "layer_types: got full_.*, must be periodic"),
    "no local layer": ("gpt_oss", {"layer_types": [GLOBAL] * 3}, "layer_types: got full_.*, must be periodic"),
    "softcap": ("gemma3_text", {"final_logit_softcapping": 30.0}, "logit_softcap: 30.0 → None"),
    "tied": ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings: got True, must be False .* olmo2"),
    "untied": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: got False, must be True .* gemma2"),
    "activation": ("mixtral", {"hidden_act": "gelu"}, r"mlp.expert: GeGLU\(.*\) → SwiGLU"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, "got model.layers.1.mlp.gate_proj.weight, which a GGUF"),
    "renormalise": ("qwen3_moe", {"norm_topk_prob": False}, "renormalise: False → True"),
    "swiglu": ("gpt_oss", {"swiglu_limit": 5.0}, "expert.limit: 5.0 → 7.0"),
    "interleave": ("deepseek_v3", {"rope_interleave": False}, "interleaved: False → True"),
    "latent": ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank: got None with 3 layers"),
    "mscale": ("deepseek_v3", {"rope_parameters": YARN}, "got mscale None and mscale_all_dim None, must be equal"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(case):
    family, change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        described(family, {**CASES[family], **change})


def described(family, fields):
    """The description of a model of a family with these fields, with tensors that nothing reads."""
    config = config_of(family, {**fields, "vocab_size": 300})
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    described, tensors = to_tensors(config, shapes, model_type=family)
    length = {"max_position_embeddings": 256}
    return describe({**length, **described}, tensors.shapes)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="asks llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_llama_cpp_reads_blocks(dtype, tmp_path, monkeypatch):
    """It rounds the inputs of every product to 8 bits in blocks of 32, to 2^-8 of the largest: the roundings of 21
    products, each in another direction, are 2^-5 of the largest logit. Those of q4_0's weights are larger."""
    monkeypatch.setitem(CASES, "llama", {**GROUPED, "hidden_size": 64, "intermediate_size": 96})
    lm = random_model("llama", tmp_path)
    lm.save_gguf(tmp_path / "model.gguf", dtype)
    prompt = np.random.default_rng(1).integers(0, 128, 24).tolist()
    (places,) = asked(tmp_path / "model.gguf", likely=[prompt], probabilities=10)["likely"]
    ids = [[*prompt, *(place[0][0] for place in places)]]
    errors = []
    for model in (gptjax.load(tmp_path / "model.gguf"), lm):
        logits = np.asarray(model.logits(ids))[0, 23:-1]
        expected = np.asarray(jax.nn.log_softmax(logits))
        worst = max(abs(value - expected[i, token]) for i, place in enumerate(places) for token, value in place)
        errors.append(worst / np.abs(logits).max())
    assert errors[0] < 2**-5
    assert errors[1] > 5 * errors[0] or dtype == "q8_0"


@pytest.mark.sampled
@pytest.mark.real
@pytest.mark.parametrize(("dtype", "least", "most"), [("f16", 0, 1e-4), ("q8_0", 0, 1e-3), ("q4_0", 0.03, 0.055)])
def test_bits_per_byte_of_stories(shared, tmp_path, dtype, least, most):
    """Those that a real model loses in a file, as docs/formats.md lists them."""
    folder = shared / "models" / "stories260k"
    lm = gptjax.load(folder)
    lm.save_gguf(tmp_path / "model.gguf", dtype)
    again = gptjax.load(tmp_path / "model.gguf", dtype="float32")
    stories = (folder / "oracle" / "tinystories_sample.txt").read_text().split("<|endoftext|>")
    stories = [story.strip() for story in stories if story.strip()]
    assert len(stories) == 5
    size = sum(len(story.encode()) for story in stories)
    before, after = (-sum(m.logprobs(story).sum() for story in stories) / np.log(2) / size for m in (lm, again))
    assert round(before, 3) == 0.887
    assert least <= after - before < most
