"""One setting, several spellings: config.json is read as `transformers` reads it, or refused."""

import copy
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from architectures import BASE
from family_cases import CASES, KINDS, saved

from gptjax.config import differences
from gptjax.interop.essence import essence
from gptjax.interop.families import FAMILIES, Fields
from gptjax.interop.huggingface import load_hf, save_hf
from gptjax.interop.safetensors import Tensors, write
from gptjax.nn import MultiHeadAttention
from gptjax.types import UserError

SCALINGS = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"type": "yarn", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "linear"},
    {},
    None,
)
SPELLINGS = {
    "rope_scaling": SCALINGS,
    "rope_parameters": (*SCALINGS, {"rope_theta": 3e4}, {**SCALINGS[0], "factor": None}, {"rope_theta": None}),
    "rope_theta": (None, 7e4),
    "rotary_emb_base": (None, 5e3),
    "rope_local_base_freq": (77.0,),
    "rotary_pct": (None, 0.5),
    "partial_rotary_factor": (None, 0.5),
    "original_max_position_embeddings": (None, 16),
    "max_position_embeddings": (256,),
    "sliding_window": (None, 7, 0),
    "use_sliding_window": (None, True, False),
    "max_window_layers": (None, 0, 2),
    "sliding_window_pattern": (2,),
    "logit_scale": (None, 0.5),
    "use_qk_norm": (None, True),
    "qk_layernorm": (None, True),
    "use_qkv_bias": (None, True),
    "use_parallel_residual": (None, True, False),
    "logits_scaling": (None, 8, 0, 0.3),
    "attention_multiplier": (None, 0.5),
    "residual_multiplier": (None, 0.5),
    "embedding_multiplier": (None, 3),
    "no_rope_layers": (None, [], [1, 0, 1], [0, 0, 0, 1]),
    "no_rope_layer_interval": (None, 2),
    "layer_types": (None, [], ["full_attention"] * 3, ["sliding_attention"] * 3, ["chunked_attention"] * 3),
    "head_dim": (None, 24),
    "hidden_size": (64,),
    "num_attention_heads": (None, 2),
    "num_key_value_heads": (None, 1),
    "num_experts": (3,),
    "num_local_experts": (3,),
    "attention_bias": (None, True, False),
    "use_bias": (None, True, False),
    "bias": (None, True, False),
    "alibi": (None, True),
    "parallel_attn": (None, False),
    "new_decoder_architecture": (None, True, False),
    "num_ln_in_parallel_attn": (None, 1, 2, 3),
    "multi_query": (None, True, False),
    "num_kv_heads": (None, 1, 4),
    "ffn_hidden_size": (None, 64),
    "n_embed": (None, 64),
    "local_attention": (None, 6, 7),
    "global_rope_theta": (None, 5e3),
    "local_rope_theta": (None, 5e3),
    "global_attn_every_n_layers": (None, 1, 2),
    "norm_bias": (None, True, False),
    "classifier_bias": (None, True, False),
    "tie_word_embeddings": (None, True, False),
    "scale_decoder_outputs": (True, False),
    "hidden_act": ("gelu", "gelu_new", "relu", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "swish"),
    "query_pre_attn_scalar": (16,),
}
"""Field -> values that are put into, or in the place of those in, the config.json of every family."""
ROTARY = ("rope_scaling", "rope_parameters", "rope_theta")
BESIDE_ROTARY = re.compile("ro(pe|t)|original_max|window|layer_types|head_dim|hidden_size|alibi|attn_every")
"""Fields that `transformers` reads beside those, so that they are tried with the older spelling as well."""
HELD_BY_SHAPES = {"num_key_value_heads"}
"""Fields whose default we do not have: the tensors of another value do not fit."""


def variants(fields):
    """Name -> config.json: each field missing, null and with other values; also as older files spell positions."""
    older = {name: value for name, value in fields.items() if name not in ROTARY}
    for kind, base in (("", fields), ("older: ", older)):
        yield f"{kind}as it is", base
        for name in sorted(base.keys() - {"model_type", "architectures", *HELD_BY_SHAPES}):
            if kind and not BESIDE_ROTARY.search(name):
                continue
            yield f"{kind}without {name}", {k: v for k, v in base.items() if k != name}
            yield f"{kind}null {name}", {**base, name: None}
        for name, values in SPELLINGS.items():
            for value in values if not kind or BESIDE_ROTARY.search(name) else ():
                yield f"{kind}{name} {value}", {**base, name: value}
    for theta in SPELLINGS["rope_theta"]:
        for name in ("rope_scaling", "rope_parameters"):
            for value in SPELLINGS[name]:
                yield f"older: rope_theta {theta}, {name} {value}", {**older, "rope_theta": theta, name: value}


def comparable(model, family):
    """The essence; without T5's head, which is tied or not by its tensors, in `transformers` too."""
    found = essence(model)
    if family.model_type == "t5":
        found["decoder"]["model"] = None
    return found


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (" " in case)) for case in CASES])
def test_every_spelling_is_read_as_transformers_reads_it(case, tmp_path):
    """`transformers` reads each file and writes what it understood; both must be the same model to us. What it does
    not read, and what we refuse, is not compared: no other exception, and most files are read by both."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    family = next(family for family in FAMILIES if family.model_type == case.split()[0])
    written = transformers.AutoConfig.for_model(family.model_type, **copy.deepcopy(CASES[case])).to_dict()
    count = both = 0
    for name, fields in variants({**written, "model_type": family.model_type}):
        count += 1
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            understood = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        except Exception:  # of many classes, KeyError and ZeroDivisionError among them
            understood = None
        try:
            ours = family.read(family.named(json.loads(json.dumps(fields))))
        except UserError:
            continue
        if understood is not None:
            both += 1
            theirs = family.read(family.named(understood))
            assert not differences(comparable(theirs, family), comparable(ours, family)), name
    assert both > count / 2, f"{both} of {count}"


def error(tmp_path, transformers, torch, auto):
    """Distance from the logits of `transformers`, as a share of the largest."""
    config, params = load_hf(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 96, (1, 60))
    theirs = getattr(transformers, auto).from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    inputs = {"input_ids": torch.tensor(tokens)}
    ours = {}
    if auto == KINDS["t5"]:
        ours, inputs = {"source": tokens}, {**inputs, "decoder_input_ids": inputs["input_ids"]}
    with torch.inference_mode():
        expected = theirs(**inputs).logits.double().numpy()
    got = np.asarray(jax.jit(config.build().apply)({"params": params}, tokens, **ours)[0], np.float64)
    return config, params, np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"rope_scaling": SCALINGS[0]}),
        ("qwen3", {"rope_scaling": SCALINGS[0]}),
        ("qwen2", {"rope_scaling": SCALINGS[2], "max_window_layers": 2, "layer_types": None}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
        ("gemma3_text", {"rope_scaling": SCALINGS[0], "rope_parameters": None, "rope_local_base_freq": 77.0}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
        ("olmo3", {"rope_scaling": SCALINGS[0], "rope_parameters": None, "layer_types": None, "rope_theta": 5e5}),
        ("smollm3 window", {"no_rope_layers": None, "no_rope_layer_interval": 2, "rope_parameters": None}),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 2, "rope_parameters": None}),
        ("stablelm", {"partial_rotary_factor": 0.5, "rope_parameters": None, "rope_theta": 7e4}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5e3, "rope_theta": 7e4, "rope_parameters": None}),
    ],
)
def test_logits_of_a_setting_in_another_place(case, changes, tmp_path):
    """Within 1e-5 of the largest logit: float32 through layers whose weights magnify its rounding."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    torch, _, _ = saved("AutoModelForCausalLM", tmp_path / "theirs", case.split()[0], **CASES[case])
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert error(tmp_path, transformers, torch, "AutoModelForCausalLM")[-1] < 1e-5


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", ["gpt2", "llama biased", "gemma2", "gpt_neox", "t5"])
@pytest.mark.parametrize("same", [True, False], ids=["a copy of the embedding", "its own"])
def test_a_head_beside_a_tied_embedding(case, same, tmp_path):
    """One that is equal is tied; another is the head, as in `transformers`, and stays when written."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    model_type = case.split()[0]
    auto = KINDS.get(model_type, "AutoModelForCausalLM")
    torch, _, _ = saved(auto, tmp_path / "theirs", model_type, **{**CASES[case], "tie_word_embeddings": True})
    family = next(family for family in FAMILIES if family.model_type == model_type)
    (weights,) = (tmp_path / "theirs").glob("*.safetensors")
    tensors = {name: np.array(tensor) for name, tensor in Tensors(weights).items()}
    embedding = tensors[family.copies[family.head]]
    noise = np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32)
    weights.unlink()
    tensors[family.head] = embedding if same else noise
    write(tmp_path / "theirs", tensors, tensors.__getitem__)
    config, params, wrong = error(tmp_path, transformers, torch, auto)
    assert wrong < 1e-4  # T5 does not scale its attention scores, which magnifies rounding
    decoder = getattr(config, "decoder", config)
    assert decoder.tie_embeddings == same
    save_hf(tmp_path / "ours", config, params, model_type=model_type)
    assert load_hf(tmp_path / "ours")[0] == config


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_it_computes_as_exactly_as_in_transformers(held, said, name, tmp_path):
    """In float32 where `transformers` does; also where the file is and config.json says bfloat16."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    torch, auto, model = saved("AutoModelForCausalLM", tmp_path / "first", "llama", **CASES["llama"])
    model.to(getattr(torch, held)).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    fields = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(fields if said is None else {**fields, name: said}))
    theirs = str(auto.from_pretrained(tmp_path / "theirs").dtype).removeprefix("torch.")
    config, params = load_hf(tmp_path / "theirs")
    assert config.dtype == ("float32" if held == "float32" else theirs)
    assert params["embedding"].dtype == held
    assert load_hf(tmp_path / "theirs", "bfloat16")[0].dtype == "bfloat16"
    if theirs == held == "float32" or (theirs, held) == ("float32", "bfloat16"):
        assert error(tmp_path, transformers, torch, "AutoModelForCausalLM")[-1] < 1e-5


def test_a_number_is_a_float_however_it_is_written():
    """An integer beyond 32 bits would be an overflow in the model."""
    granite = next(family for family in FAMILIES if family.model_type == "granite")
    integers = {"rms_norm_eps": 1, "residual_multiplier": 2**31, "attention_multiplier": 2**40, "logits_scaling": 8}
    model = granite.read(granite.named({**PLAIN, **integers}))
    numbers = (model.norm.eps, model.residual.multiplier, model.attention.scale, model.logit_scale)
    assert [(type(number), number) for number in numbers] == [(float, x) for x in (1, 2**31, 2**40, 1 / 8)]


PLAIN = {
    "vocab_size": 16, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "layer_norm_epsilon": 1e-5, "activation": "gelu",
}  # fmt: skip


def test_what_disagrees_is_refused_in_one_line():
    llama, gpt2, gemma2, gemma3, qwen2, olmo3, smollm3, falcon, roberta, modernbert = (
        next(family for family in FAMILIES if family.model_type == name)
        for name in (
            *("llama", "gpt2", "gemma2", "gemma3_text", "qwen2", "olmo3", "smollm3"),
            *("falcon", "roberta", "modernbert"),
        )
    )
    scaled = {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": SCALINGS[2]}
    for family, changes, message in (
        (llama, scaled, "rope_scaling: got rope_theta 10000.0 beside rope_parameters with 1000000.0"),
        (llama, {"rope_scaling": {"type": "linear"}}, "rope_parameters: got none for factor, which 'linear' needs"),
        (llama, {"rope_scaling": {"type": "linear", "rope_type": "default"}}, "got rope_type 'default' and type"),
        (llama, {"rope_scaling": "yarn"}, "rope_scaling: got 'yarn', must be an object"),
        (llama, {"rope_parameters": {"full_attention": {}}}, "got one for each of full_attention"),
        (llama, {"hidden_size": None}, "got null for hidden_size"),
        (gpt2, {"n_head": 2, "num_attention_heads": 4}, "num_attention_heads: got 4 beside n_head 2"),
        (gemma3, {"rope_parameters": {"factor": 2.0}}, "rope_parameters: got factor, must be full_attention and"),
        (qwen2, {"layer_types": ["sliding_attention"] * 2}, "layer_types: got sliding_attention, which needs"),
        (qwen2, {"layer_types": ["full_attention"]}, "layer_types: got ['full_attention'], must be"),
        (gemma2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, must be 1.0"),
        (gemma2, {"sliding_window": 0}, "model.pattern: window: got 0, must be at least 1"),
        (olmo3, {"rope_theta": 7e4}, "rope_theta: got 70000.0, which does not say whether sliding_attention layers"),
        (smollm3, {"no_rope_layers": [1]}, "no_rope_layers: got 1 numbers, must be one for each of 2 layers"),
        (smollm3, {"layer_types": ["sliding_attention"] * 2}, "layer_types: got sliding_attention, which needs"),
        (roberta, {"pad_token_id": 15, "max_position_embeddings": 16}, "pad_token_id: got 15, must be less than"),
        (modernbert, {"rope_scaling": SCALINGS[2]}, "rope_scaling: got one for both kinds of layers, must be in rope_"),
        (modernbert, {"local_attention": 9, "sliding_window": 5}, "sliding_window: got 5, must be half of local_att"),
        (falcon, {"alibi": True}, "alibi: got True, must be False"),
        (falcon, {"parallel_attn": None}, "parallel_attn: got None, must be True"),
        (falcon, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn: got 2, must be 1"),
        (falcon, {"multi_query": False, "num_kv_heads": 1}, "num_kv_heads: got 1, must be 2 without new_decoder_arch"),
    ):
        with pytest.raises(UserError, match=rf".*{re.escape(message)}"):
            family.read(family.named(Fields({**PLAIN, "query_pre_attn_scalar": 8, "sliding_window": 4, **changes})))


def test_settings_of_training_are_not_what_a_model_computes():
    settings = {"remat": "nothing_saveable", "microbatches": 4, "pipeline_chunks": BASE.layers, "dropout": 0.1}
    settings |= {"float8": True, "attention": MultiHeadAttention(implementation="chunked")}
    assert essence(dataclasses.replace(BASE, **settings)) == essence(BASE)
