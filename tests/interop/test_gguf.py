"""GGUF files, read back by the `gguf` package, which llama.cpp's own converter uses."""

import json

import ml_dtypes
import numpy as np
import pytest

from gptjax.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    TrainSentencePiece,
    load_tokenizer,
)
from gptjax.interop.families.rope import of_rope
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf import write as ours
from gptjax.interop.gguf.encodings import WRITTEN
from gptjax.nn import RoPE, YaRN
from gptjax.types import UserError

gguf = pytest.importorskip("gguf")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 360,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "vocab_size": 360,
    "layer_norm_epsilon": 1e-6,
    "activation_function": "gelu_new",
}
CONFIGS = {
    "llama": LLAMA,
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": True},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 32},
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False},
}


def checkpoint(config):
    """Random tensors, named and shaped as transformers does for `config`."""
    rng = np.random.default_rng(0)
    if config["model_type"] == "gpt2":
        D = config["n_embd"]
        shapes = {"wte.weight": (360, D), "wpe.weight": (16, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
        for i in range(config["n_layer"]):
            for name, shape in {
                "ln_1": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D),
                "ln_2": (D,), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D),
            }.items():  # fmt: skip
                shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
        shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
        tied = config.get("tie_word_embeddings", True)
    else:
        D, F, N = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
        H, tied = config.get("head_dim", D // N), config["tie_word_embeddings"]
        Q, K = N * H, config["num_key_value_heads"] * H
        biased = "qkv" if config["model_type"] == "qwen2" else "qkvo" if config.get("attention_bias") else ""
        shapes = {"model.embed_tokens.weight": (360, D), "model.norm.weight": (D,)}
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            shapes |= {layer + "input_layernorm.weight": (D,), layer + "post_attention_layernorm.weight": (D,)}
            for letter, shape in {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q)}.items():
                shapes[f"{layer}self_attn.{letter}_proj.weight"] = shape
                if letter in biased:
                    shapes[f"{layer}self_attn.{letter}_proj.bias"] = shape[:1]
            for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
                shapes[f"{layer}mlp.{name}_proj.weight"] = shape
                if config.get("mlp_bias"):
                    shapes[f"{layer}mlp.{name}_proj.bias"] = shape[:1]
            if config["model_type"] == "qwen3":
                shapes |= {layer + f"self_attn.{letter}_norm.weight": (H,) for letter in "qk"}
    if not tied:
        shapes["lm_head.weight"] = (360, D)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def in_gguf(config, name, x):
    """A tensor as llama.cpp reads it: GPT-2's matrices as [out, in]; of Llama's queries and keys, channel j of a head
    at 2 j and channel j + H/2 at 2 j + 1."""
    if config["model_type"] == "gpt2":
        return x.T if ".h." in name else x
    if config["model_type"] in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        H = len(x) // heads
        source = [head * H + j + half for head in range(heads) for j in range(H // 2) for half in (0, H // 2)]
        return x[source]
    return x


@pytest.fixture(scope="module")
def tokenizer():
    return TrainSentencePiece(vocab=350).build(["To be, or not to be, that is the question: " * 9])


def read(path):
    """The tensors and the metadata of a file."""
    reader = gguf.GGUFReader(path)
    return {t.name: t for t in reader.tensors}, {name: field.contents() for name, field in reader.fields.items()}


def logical(tensor):
    """The tensor's numbers, by the package's own decoder."""
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", WRITTEN)
@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_have_llama_cpps_names_layout_and_bytes(tmp_path, tokenizer, kind, dtype):
    config = CONFIGS[kind]
    tensors = checkpoint(config)
    ours.write(tmp_path / "model.gguf", config, tensors, tokenizer, dtype)
    found, metadata = read(tmp_path / "model.gguf")
    arch = {number: arch for arch, number in gguf.MODEL_ARCH_NAMES.items()}[metadata["general.architecture"]]
    names = gguf.get_tensor_name_map(arch, 2)
    expected = {names.get_name(name, (".weight", ".bias")): in_gguf(config, name, x) for name, x in tensors.items()}
    assert found.keys() == expected.keys()
    wanted = gguf.GGMLQuantizationType[dtype.upper()]
    for name, x in expected.items():
        tensor = found[name]
        exact = x.ndim == 1 or name == "position_embd.weight" or (dtype.startswith("q") and x.shape[1] % 32)
        ends = dtype == "q4_0" and name in ("token_embd.weight", "output.weight")
        here = gguf.GGMLQuantizationType.Q8_0 if ends else wanted
        assert tensor.tensor_type == (gguf.GGMLQuantizationType.F32 if exact else here), name
        assert tuple(tensor.shape) == x.shape[::-1], name
        assert tensor.data_offset % 32 == 0
        data = gguf.quantize(np.ascontiguousarray(x), tensor.tensor_type)
        assert tensor.data.tobytes() == data.tobytes(), name
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            # Half a step of rounding, and up to 127 times what float16 takes from the step.
            step = np.abs(x.reshape(-1, 32)).max(1) / 127
            error = np.abs(logical(tensor) - x).reshape(-1, 32).max(1)
            assert (error <= step * (0.5 + 127 * 2**-11) * (1 + 1e-6)).all(), name


def test_q8_0_rounds_as_ggml_does():
    """Ties, zeros, and blocks too small for a float16 scale."""
    rng = np.random.default_rng(0)
    ties = np.append(127, np.arange(-15.5, 15.5)).astype(np.float32)
    near = np.append(127, np.full(31, np.nextafter(np.float32(0.5), np.float32(0))))
    rows = [
        ties,
        near,
        np.zeros(32),
        np.full(32, 1e-9),
        *10.0 ** rng.uniform(-8, 4, (50, 32)) * rng.choice([-1, 1], 32),
    ]
    x = np.stack(rows).astype(np.float32)
    assert WRITTEN["q8_0"].write(x).tobytes() == gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_bfloat16_tensors_are_written_as_they_are(tmp_path, tokenizer):
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in checkpoint(LLAMA).items()}
    ours.write(tmp_path / "model.gguf", LLAMA, tensors, tokenizer, "bf16")
    found, _ = read(tmp_path / "model.gguf")
    np.testing.assert_array_equal(logical(found["output.weight"]), tensors["lm_head.weight"].astype(np.float32))


def test_metadata_is_what_llama_cpp_asks_for(tmp_path, tokenizer):
    K = gguf.Keys
    config = CONFIGS["mistral"]
    ours.write(tmp_path / "tiny.gguf", config, checkpoint(config), tokenizer, "q8_0", chat_template="{{ x }}")
    _, found = read(tmp_path / "tiny.gguf")
    expected = {
        K.General.ARCHITECTURE: "llama",
        K.General.NAME: "tiny",
        K.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_Q8_0),
        K.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        K.LLM.CONTEXT_LENGTH: 8,  # the sliding window
        K.LLM.EMBEDDING_LENGTH: 64,
        K.LLM.BLOCK_COUNT: 2,
        K.LLM.FEED_FORWARD_LENGTH: 72,
        K.LLM.VOCAB_SIZE: 360,
        K.Attention.HEAD_COUNT: 4,
        K.Attention.HEAD_COUNT_KV: 2,
        K.Attention.KEY_LENGTH: 16,
        K.Attention.VALUE_LENGTH: 16,
        K.Attention.LAYERNORM_RMS_EPS: pytest.approx(1e-5),
        K.Rope.DIMENSION_COUNT: 16,
        K.Rope.FREQ_BASE: 5e5,
        K.Tokenizer.CHAT_TEMPLATE: "{{ x }}",
    }
    assert {key: found[key.format(arch="llama")] for key in expected} == expected
    ours.write(tmp_path / "gpt2.gguf", GPT2, checkpoint(GPT2), tokenizer, "f16")
    _, found = read(tmp_path / "gpt2.gguf")
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    assert found["gpt2.feed_forward_length"] == 128
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_gpt2_may_be_named_without_its_prefix(tmp_path, tokenizer):
    named = checkpoint(GPT2)
    bare = {name.removeprefix("transformer."): x for name, x in named.items()} | {
        "h.0.attn.bias": np.ones((1, 1, 16, 16))
    }
    for folder, tensors in (("named", named), ("bare", bare)):
        (tmp_path / folder).mkdir()
        ours.write(tmp_path / folder / "model.gguf", GPT2, tensors, tokenizer)
    assert (tmp_path / "named/model.gguf").read_bytes() == (tmp_path / "bare/model.gguf").read_bytes()


def test_sentencepiece_keys(tmp_path, tokenizer):
    extended = tokenizer.with_specials(["<|tool|>"])
    ours.write(tmp_path / "model.gguf", LLAMA, checkpoint(LLAMA), extended)
    _, found = read(tmp_path / "model.gguf")
    key = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items()}
    kinds = [gguf.TokenType(kind).name for kind in key["token_type"]]
    n = tokenizer.vocab
    assert key["model"] == "llama"
    assert (key["bos_token_id"], key["eos_token_id"], key["unknown_token_id"]) == (1, 2, 0)
    assert (key["add_bos_token"], key["add_space_prefix"]) == (True, False)
    assert key["tokens"][:4] == ["<unk>", "<|bos|>", "<|end|>", "<|system|>"]
    assert kinds[:7] == ["UNKNOWN"] + ["CONTROL"] * 5 + ["BYTE"]
    assert key["tokens"][n : n + 2] == ["<|tool|>", f"[PAD{n + 1}]"]
    assert kinds[n : n + 2] == ["CONTROL", "UNUSED"]
    assert len(key["tokens"]) == len(key["scores"]) == len(kinds) == 360
    normal = [i for i, kind in enumerate(kinds) if kind == "NORMAL"]
    assert [key["tokens"][i].replace("\u2581", " ").encode() for i in normal] == [tokenizer.pieces[i] for i in normal]
    merged = [key["scores"][i] for i in normal if len(key["tokens"][i]) > 1]
    assert merged == sorted(merged, reverse=True)  # learned first, merged first


@pytest.mark.alone
@pytest.mark.real
def test_gpt2_keys_are_the_same_from_each_of_its_files(shared):
    """The merges that OpenAI published, found again from the ranks alone."""
    folder = shared / "tokenizers" / "gpt2"
    from_ranks, from_json = (
        gguf_tokenizer.metadata(load_tokenizer(file), 50_257) for file in (folder, folder / "tokenizer.json")
    )
    assert from_ranks == from_json
    key = {name.removeprefix("tokenizer.ggml."): value for name, value in from_ranks.items()}
    assert key["merges"] == (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    assert (key["model"], key["pre"], key["add_bos_token"]) == ("gpt2", "gpt-2", False)
    assert key["tokens"][-2:] == ["Ġgazed", "<|endoftext|>"]
    assert key["token_type"][-2:] == [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL]


def rotate(x, theta, interleaved):
    """Rotary embedding of x [T, N, H] at positions 0..T-1."""
    T, _, H = x.shape
    angle = np.arange(T)[:, None, None] * theta ** (-np.arange(0, H, 2) / H)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., : H // 2], x[..., H // 2 :])
    pair = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)


def attention(x, q, k, v, N, interleaved):
    """Causal attention of x [T, D] with grouped queries, before the output projection."""
    T, H = len(x), len(q) // N
    q, k, v = ((x @ w.T.astype(np.float64)).reshape(T, -1, H) for w in (q, k, v))
    q, k = rotate(q, 1e4, interleaved), rotate(k, 1e4, interleaved)
    k, v = (np.repeat(y, N // y.shape[1], 1) for y in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / H**0.5
    scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.real
def test_interleaved_attention_of_stories_is_hugging_faces(shared, tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    folder = shared / "models" / "stories260k"
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    ours.write(tmp_path / "stories.gguf", config, tensors, tokenizer, "f32")
    found, metadata = read(tmp_path / "stories.gguf")
    processor = tokenizer._processor
    assert metadata["tokenizer.ggml.tokens"] == [processor.id_to_piece(i) for i in range(512)]
    assert metadata["tokenizer.ggml.scores"] == [processor.get_score(i) for i in range(512)]
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily.")
    x = tensors["model.embed_tokens.weight"][ids].astype(np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    for i in range(config["num_hidden_layers"]):
        theirs = attention(x, *(tensors[f"model.layers.{i}.self_attn.{k}_proj.weight"] for k in "qkv"), 8, False)
        here = attention(x, *(logical(found[f"blk.{i}.attn_{k}.weight"]) for k in "qkv"), 8, True)
        np.testing.assert_allclose(here, theirs, rtol=1e-10, atol=1e-10)  # float64: only the order of sums differs


@pytest.mark.torch
def test_llama_3_frequencies_are_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    rope |= {"original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LLAMA | {"rope_parameters": rope, "head_dim": 64}
    ours.write(tmp_path / "model.gguf", config, checkpoint(config), tokenizer)
    found, _ = read(tmp_path / "model.gguf")
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**config), "cpu")
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    divisors = logical(found["rope_freqs.weight"])
    assert len(set(divisors)) > 3
    np.testing.assert_allclose(plain / divisors, expected.numpy(), rtol=1e-6)  # a few roundings to float32


def test_rope_scaling_has_keys(tmp_path, tokenizer):
    """Also where a model that we loaded says what is as usual in llama.cpp too."""
    whole = {"type": "yarn", "factor": 4.0, "original_context_length": 4}
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}}
    cases = [(yarn, whole), (of_rope(RoPE(5e5, YaRN(4.0, 4))), whole)]
    steeper = of_rope(RoPE(5e5, YaRN(4.0, 4, beta_fast=16.0)))
    cases += [(steeper, {**whole, gguf.Keys.Rope.SCALING_YARN_BETA_FAST.split(".")[-1]: 16.0})]
    for i, (fields, expected) in enumerate(cases):
        ours.write(tmp_path / f"{i}.gguf", LLAMA | fields, checkpoint(LLAMA), tokenizer)
        _, found = read(tmp_path / f"{i}.gguf")
        assert {k.split(".")[-1]: value for k, value in found.items() if ".rope.scaling" in k} == expected
    assert found["llama.rope.freq_base"] == 5e5


def without(name):
    return {key: x for key, x in checkpoint(LLAMA).items() if key != name}


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        ({"model_type": "bert"}, None, "model_type: got 'bert', .* llama, mistral, mixtral, qwen2, qwen3, .* gpt2"),
        ({"hidden_act": "gelu"}, None, r"architecture llama cannot express it; .*mlp: GeGLU\(.*\) → SwiGLU"),
        ({"hidden_size": None}, None, "got null for hidden_size"),
        (of_rope(RoPE(scaling=YaRN(4.0, 4, truncate=False))), None, "rope_scaling: got yarn .* truncate False, GGUF"),
        ({"rope_scaling": {"rope_type": "longrope"}}, None, "rope_parameters: got none for short_factor"),
        ({"max_position_embeddings": None}, None, "max_position_embeddings"),
        ({}, without("model.norm.weight"), "missing model.norm.weight, which a llama"),
        ({}, checkpoint(LLAMA) | {"model.extra": np.zeros(2)}, "unexpected model.extra, which"),
        ({}, checkpoint(LLAMA) | {"model.norm.weight": np.zeros(2)}, r"norm.weight: got shape \(2,\), must be \(64,\)"),
        ({}, checkpoint(LLAMA) | {"lm_head.weight": np.full((360, 64), 1e5)}, "output.weight .* too large for float16"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(tmp_path, tokenizer, change, tensors, message):
    with pytest.raises(UserError, match=message):
        ours.write(tmp_path / "model.gguf", LLAMA | change, tensors or checkpoint(LLAMA), tokenizer, "f16")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_cannot_be_written_are_refused(tmp_path, tokenizer):
    unigram = TrainSentencePiece(vocab=300, kind="unigram").build(["To be, or not to be, that is the question: " * 9])
    words = TiktokenTokenizer(b"YQ== 0\n", {"<|end|>": 1}, r"\w+")
    for refused, message in [
        (ByteTokenizer(b"", {"<|end|>": 256}), "got kind bytes, must be a BPE"),
        (ByteTokenizer(b"", {}), "got no end token"),
        (unigram, "of kind unigram"),
        (words, r"got the pattern '\\\\w\+', .* gpt-2"),
        (SentencePieceTokenizer(tokenizer.data, {"<|end|>": 999}), "got 1,000 ids"),
    ]:
        with pytest.raises(UserError, match=message):
            ours.write(tmp_path / "model.gguf", LLAMA, checkpoint(LLAMA), refused)
    with pytest.raises(UserError, match="dtype: got 'q2_k', must be one of f32, f16, bf16, q4_0, q8_0"):
        ours.write(tmp_path / "model.gguf", LLAMA, checkpoint(LLAMA), tokenizer, "q2_k")
