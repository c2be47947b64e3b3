"""Every model family: what `transformers` computes with its random models we compute too, there and back."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, GROUPED, KINDS, YARN, saved
from jax.sharding import PartitionSpec

from experiments import nanochat_d4, nanochat_hf
from gptjax.distributed.sharding import MeshConfig, ShardingRules
from gptjax.interop.families import FAMILIES, Fields
from gptjax.interop.huggingface import expressing, from_tensors, load_hf, read_kind, read_labels, save_hf, to_tensors
from gptjax.interop.safetensors import SINGLE, Tensors
from gptjax.models.loading import load
from gptjax.nn import (
    ALiBi,
    ClassifierConfig,
    LayerOverrides,
    Mean,
    RecurrentConfig,
    ReLUSquared,
    TokenClassifierConfig,
    Transformer,
    TransformerConfig,
    count,
)
from gptjax.types import UserError


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", CASES)
def test_a_model_of_transformers_goes_in_and_out(case, tmp_path):
    family = case.split()[0]
    kind = KINDS.get(family, "AutoModelForCausalLM")
    masked = kind == "AutoModelForMaskedLM"
    torch, auto, theirs = saved(kind, tmp_path / "theirs", family, **CASES[case])
    config, params = load_hf(tmp_path / "theirs")

    random = np.random.default_rng(0)
    source = torch.tensor(random.integers(3, 96, (1, 24)))  # RoBERTa's padding, token 2, has no position
    with torch.inference_mode():
        whole = source if masked else torch.tensor(random.integers(0, 96, (1, 56)))
        ours, inputs = {}, {"input_ids": whole}
        if family == "t5":
            ours, inputs = {"source": source.numpy()}, {"input_ids": source, "decoder_input_ids": whole}
        expected = theirs(**inputs).logits.numpy()
        logits = np.asarray(jax.jit(config.build().apply)({"params": params}, whole.numpy(), **ours)[0])
        difference = np.abs(logits - expected).max() / np.abs(expected).max()
        print(f"\n{case}: {difference:.1e}")
        assert difference < 1e-4

        save_hf(tmp_path / "ours", config, params, model_type=family)
        again = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert type(again) is type(theirs)
        np.testing.assert_array_equal(again(**inputs).logits.numpy(), expected)
    again.save_pretrained(tmp_path / "again")
    config_again, params_again = load_hf(tmp_path / "again")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


CLASSIFIERS = (
    "gpt2", "llama biased", "gpt_neox", "falcon new", "bloom", "gemma3_text", "bert", "roberta", "modernbert",
    "modernbert odd",
    *(
        pytest.param(case, marks=pytest.mark.slow)  # the same row of llama's table for the head
        for case in ("gemma", "smollm3", "stablelm 2", "starcoder2", "qwen3_moe")
    ),
)  # fmt: skip


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_of_transformers_goes_in_and_out(case, tmp_path):
    """Two texts, the second of which is shorter: padded with 2."""
    family = case.split()[0]
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    fields = {**CASES[case], "pad_token_id": 2, **labels}
    torch, auto, theirs = saved("AutoModelForSequenceClassification", tmp_path / "theirs", family, **fields)
    assert read_kind(tmp_path / "theirs") is ClassifierConfig
    assert read_labels(tmp_path / "theirs") == ("bad", "fair", "good")
    config, params = load_hf(tmp_path / "theirs")
    assert isinstance(config, ClassifierConfig)

    tokens = np.random.default_rng(0).integers(3, 96, (2, 24))
    tokens[1, 15:] = 2
    there = (tokens != 2).astype(int)
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(there)}
    with torch.inference_mode():
        expected = theirs(**inputs).logits.numpy()
        logits = jax.jit(config.build().apply)({"params": params}, tokens, segments=there)[0][:, 0]
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4
        save_hf(tmp_path / "ours", config, params, model_type=family, labels=("bad", "fair", "good"))
        again = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert type(again) is type(theirs)
        assert again.config.id2label == labels["id2label"]
        assert again.config.architectures == theirs.config.architectures
        again.config.pad_token_id = 2  # of the tokenizer, which is not here
        np.testing.assert_array_equal(again(**inputs).logits.numpy(), expected)
    config_again, params_again = load_hf(tmp_path / "ours")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", ["bert", "roberta", "llama"])
def test_a_classifier_of_tokens_of_transformers_goes_in_and_out(case, tmp_path):
    names = {"id2label": {0: "O", 1: "B", 2: "I"}, "label2id": {"O": 0, "B": 1, "I": 2}}
    torch, auto, theirs = saved("AutoModelForTokenClassification", tmp_path / "theirs", case, **CASES[case], **names)
    config, params = load_hf(tmp_path / "theirs")
    assert isinstance(config, TokenClassifierConfig)
    assert (config.classes, config.bias) == (3, True)
    tokens = np.random.default_rng(0).integers(3, 96, (1, 24))
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        logits = np.asarray(jax.jit(config.build().apply)({"params": params}, tokens)[0])
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4
        save_hf(tmp_path / "ours", config, params, model_type=case, labels=("O", "B", "I"))
        again = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.numpy(), expected)


def test_what_is_asked_of_a_classifier():
    backbone = TransformerConfig(vocab=16, layers=1, width=8, heads=2)
    model = ClassifierConfig(backbone, 2, Mean()).build()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
    with pytest.raises(UserError, match=r"nearest, .*, differs in classifier.pooling: Mean\(\) → Last\(\)"):
        to_tensors(ClassifierConfig(backbone, 2, Mean()), params["params"])
    fields = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(UserError, match="problem_type: got 'regression', must be 'single_label_classification'"):
        from_tensors({**fields, "problem_type": "regression"}, {})
    with pytest.raises(UserError, match=r"architectures: got \['T5ForSequenceClassification'\], must be T5ForCond"):
        from_tensors({"model_type": "t5", "architectures": ["T5ForSequenceClassification"]}, {})
    config = ClassifierConfig(nanochat_hf.experiment.model, 2)
    with pytest.raises(UserError, match="classifier: got one, for which nanochat has no class in `transformers`"):
        expressing(config, "nanochat")


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", ["phi3 long", "phi3 4-mini"])
def test_phi_reads_beyond_its_original_length(case, tmp_path):
    """`transformers` takes the long factors for a text beyond it, and the short ones within."""
    torch, auto, theirs = saved("AutoModelForCausalLM", tmp_path / "theirs", "phi3", **CASES[case])
    config, params = load_hf(tmp_path / "theirs")
    save_hf(tmp_path / "ours", config.for_context_length(128), params)
    again = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for length, model in ((64, config), (100, config.for_context_length(128))):
        tokens = np.random.default_rng(0).integers(0, 96, (1, length))
        with torch.inference_mode():
            expected, same = (m(torch.tensor(tokens)).logits.numpy() for m in (theirs, again))
        logits = np.asarray(jax.jit(model.build().apply)({"params": params}, tokens)[0])
        np.testing.assert_array_equal(same, expected)
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4
    other = np.asarray(jax.jit(config.build().apply)({"params": params}, tokens)[0])
    assert np.abs(other - expected).max() / np.abs(expected).max() > 1e-3
    lm = load(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"tokens: got 100, must be at most 64, .* use lm.for_context_length\(100\)"):
        lm.logits(tokens)
    assert lm.logits(tokens[:, :64]).shape == (1, 64, 96)
    assert np.abs(lm.for_context_length(100).logits(tokens) - expected).max() / np.abs(expected).max() < 1e-4


def tiny(**changes):
    """A model, what config.json says of it, and its tensors."""
    config = TransformerConfig(vocab=16, layers=2, width=8, heads=2, kv_heads=1, hidden=12, **changes)
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(init, jnp.zeros((1, 1), int)))[
        "params"
    ]
    fields, tensors = to_tensors(config, params)
    return config, fields, dict(tensors)


def test_tensors_that_do_not_fit_are_refused_by_name():
    _, fields, tensors = tiny()
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=rf"^tensors: missing {name}, which a llama of this configuration needs"):
        from_tensors(fields, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match=r"^tensors: unexpected model.layers.2.mlp.up_proj.weight, which"):
        from_tensors(fields, {**tensors, "model.layers.2.mlp.up_proj.weight": tensors[name]})
    with pytest.raises(UserError, match=rf"^tensors: {name}: got shape \(8, 12\), must be \(12, 8\) by config.json"):
        from_tensors(fields, {**tensors, name: tensors[name].T})
    with pytest.raises(UserError, match=r"^tensors: missing lm_head.weight"):
        from_tensors({**fields, "tie_word_embeddings": False}, tensors)


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_names_of_older_files_are_known(case):
    """bert-base-uncased has them, and t5-small a bias that nobody uses."""
    defaults = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_epsilon": 1e-6}
    fields = {"model_type": case, **CASES[case], **defaults}
    config = next(family for family in FAMILIES if family.model_type == case).read(Fields(fields))
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype("f"), shapes)
    tensors = dict(to_tensors(config, params)[1])
    if case == "bert":
        ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        old = {re.sub("LayerNorm.*", lambda end: ends[end[0]], name): x for name, x in tensors.items()}
        assert old.keys() & tensors.keys() < tensors.keys()
    else:
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        old = {**tensors, unused: np.ones((8, 4)), "lm_head.weight": tensors["shared.weight"]}
    jax.tree.map(np.testing.assert_array_equal, from_tensors(fields, old)[1], params)


def test_a_model_computes_in_the_dtype_of_most_of_it():
    """Copies of DeepSeek-V3 in bfloat16 keep the routers' biases in float32."""
    _, fields, tensors = tiny()
    for most, few in (("bfloat16", "float32"), ("float32", "bfloat16")):
        mixed = {name: x.astype(jnp.dtype(few if x.ndim == 1 else most)) for name, x in tensors.items()}
        config, params = from_tensors(fields, mixed)
        assert config.dtype == params["embedding"].dtype == most
        assert params["norm"]["scale"].dtype == few


def test_what_nobody_needs_is_passed_over():
    _, fields, tensors = tiny()
    copy = tensors["model.embed_tokens.weight"]
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2), "lm_head.weight": copy}
    assert from_tensors(fields, {**tensors, **buffers})[0] == from_tensors(fields, tensors)[0]
    without_head = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    params = from_tensors(fields, without_head)[1]
    assert count(params) == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "mpt", "model_type: got 'mpt', must be one of gpt2, llama, "),
        ("hidden_act", "xielu", "config.json: hidden_act: got 'xielu', must be one of silu, "),
        (
            "rope_scaling",
            {"rope_type": "dynamic"},
            "config.json: rope_scaling: got 'dynamic', must be one of default, ",
        ),
        (
            "quantization_config",
            {"quant_method": "hqq"},
            "config.json: quantization_config: got hqq, must be compressed-tensors, gptq, awq, bitsandbytes, mxfp4, ",
        ),
    ],
)
def test_settings_that_we_do_not_have_are_refused(field, value, message):
    _, fields, tensors = tiny()
    fields.pop("rope_parameters")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        from_tensors({**fields, field: value}, tensors)
    del fields["hidden_size"]
    with pytest.raises(UserError, match=r"^config.json: missing hidden_size"):
        from_tensors(fields, tensors)


def test_a_model_that_no_family_has_is_refused_and_the_reason_named():
    with pytest.raises(
        UserError, match=r"^model: no published family .* llama, differs in model.mlp: got ReLUSquared\(\), must"
    ):
        tiny(mlp=ReLUSquared())
    with pytest.raises(UserError, match=r"layers.1.attention.window: 4 → 3"):
        tiny(pattern=(LayerOverrides(window=3), LayerOverrides(window=4)))
    # The nearest has the fewest differences, those of all layers counted once, and the message has all of them.
    config = TransformerConfig(vocab=16, layers=3, width=8, heads=2, positions=ALiBi(), embedding_scale=2.0)
    found = (
        r"granite,? differs in model\.positions: ALiBi\(\) → RoPE\([^;]*\)$",  # llama in the embeddings' scale too
        r"gpt2 differs in model\.mlp: got SwiGLU\(\), must be [^;]*; model\.positions: ALiBi\(\) → "
        r"LearnedPositions[^;]*; model\.norm: [^;]*; model\.embedding_scale: [^;]*; "
        r"layers\.\*\.attention\.bias: False → True; .*",
    )
    for family, message in (
        (None, f"^model: no published family .*; the nearest, {found[0]}"),
        ("gpt2", f"^model: {found[1]}"),
    ):
        with pytest.raises(UserError, match=message):
            to_tensors(config, {}, model_type=family)
    with pytest.raises(UserError, match=r"^model: got RecurrentConfig, must be EncoderConfig, "):
        to_tensors(RecurrentConfig(vocab=16, layers=1, width=8), {})


def test_the_nanochat_of_transformers_is_one_of_two():
    """Parts that its class lacks are named."""
    assert expressing(nanochat_hf.experiment.model).model_type == "nanochat"
    for family, wrong in (("nanochat", "model: nanochat differs"), (None, "the nearest, nanochat, differs")):
        with pytest.raises(UserError, match=rf"{wrong} in model.residual: ScaledStream.*window: 64 → None"):
            expressing(nanochat_d4.experiment.model, family)
    fields = {**GROUPED, "hidden_act": "relu2", "rms_norm_eps": 1e-6, "rope_parameters": YARN}
    family = next(family for family in FAMILIES if family.model_type == "nanochat")
    with pytest.raises(UserError, match=r"rope_parameters: got an attention_factor of 1.138.*, must be 1 in nanochat"):
        family.read(Fields(fields))


def test_what_training_needs_is_not_asked_of_a_family():
    training = {"dropout": 0.1, "layer_drop": 0.1, "dtype": "bfloat16", "remat": "dots_saveable"}
    _, fields, _ = tiny(**training, pattern=(LayerOverrides(), LayerOverrides()))
    assert "dropout" not in fields
    assert fields["model_type"] == "llama"


def test_parameters_come_to_lie_as_the_rules_say(tmp_path):
    config, _, _ = tiny()
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    save_hf(tmp_path / "one", config, params, dtype="bfloat16")
    rules = ShardingRules(embed="fsdp", heads="tensor", ffn="tensor", vocab="tensor")
    with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        _, sharded = load_hf(tmp_path / "one", "bfloat16", rules)
        save_hf(tmp_path / "two", config, sharded, dtype="bfloat16")
    assert sharded["blocks"]["attention"]["q"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), sharded, params)
    assert (tmp_path / "one" / SINGLE).read_bytes() == (tmp_path / "two" / SINGLE).read_bytes()


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["int8", "bool", "fp16", "f16", "float64", "complex64", "float8_e4m3fn", "", None])
def test_a_dtype_that_holds_no_weights_is_refused(dtype, tmp_path):
    config, _, _ = tiny()
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    with pytest.raises(UserError, match=r"^dtype: got .*, must be one of float32, bfloat16, float16$"):
        save_hf(tmp_path / "model", config, params, dtype=dtype)
    assert not (tmp_path / "model").exists()


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [("float16", 65_504.0, 66_000.0), ("bfloat16", 3.38e38, 3.4e38), ("float32", 3.4e38, None)],
)
def test_no_weight_becomes_infinite(dtype, largest, beyond, tmp_path):
    config, _, _ = tiny()
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    down = params["blocks"]["mlp"]["down"]
    params["blocks"]["mlp"]["down"] = down.at[0, 0, 0].set(largest)
    save_hf(tmp_path / "model", config, params, dtype=dtype)
    tensors = Tensors(tmp_path / "model")
    assert all(np.isfinite(x).all() and np.any(x) for x in tensors.values())
    params["blocks"]["mlp"]["down"] = down.at[0, 0, 0].set(np.inf)
    save_hf(tmp_path / "infinite already", config, params, dtype=dtype)
    if beyond is None:
        return
    params["blocks"]["mlp"]["down"] = down.at[0, 0, 0].set(beyond)
    with pytest.raises(
        UserError, match=rf"^dtype: model.layers.0.mlp.down_proj.weight has values too large for {dtype}"
    ):
        save_hf(tmp_path / "larger", config, params, dtype=dtype)
