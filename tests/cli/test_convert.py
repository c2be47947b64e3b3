"""`gptjax convert`: what goes from one program's files to another's arrives whole."""

import struct

import jax
import numpy as np
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.data import TrainSentencePiece
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.interop import peft
from gptjax.models.language_model import LanguageModel
from gptjax.nn import GELU, LayerNorm, LearnedPositions, LoRA, MultiTokenConfig, TransformerConfig
from gptjax.types import UserError

GPT2 = TransformerConfig(
    320, 2, 32, 4, hidden=64, positions=LearnedPositions(48), norm=LayerNorm(), mlp=GELU(), bias=True
)  # fmt: skip
LLAMA = TransformerConfig(320, 2, 32, 4, kv_heads=2, hidden=64, tie_embeddings=False)
TEXT = "To be, or not to be, that is the question. "


@pytest.fixture(scope="module")
def tokenizer():
    return TrainSentencePiece(vocab=320).build(iter([TEXT * 9]))


def make(config, tokenizer) -> LanguageModel:
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), int))["params"]
    rng = np.random.default_rng(0)
    return LanguageModel(config, jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), shapes), tokenizer, 48)


def convert(*arguments) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_to_transformers_and_back(config, tokenizer, tmp_path, capsys):
    lm = make(config, tokenizer)
    lm.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", "--to", "gptjax")
    back = gptjax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)
    assert back.context == 48
    assert back.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert (back.tokenizer.bos, back.tokenizer.eos) == (tokenizer.bos, tokenizer.eos)
    size = sum(x.size for x in flat(lm.params).values())
    assert capsys.readouterr().out.splitlines()[0] == f"{size:,} parameters in {tmp_path / 'hf'}"
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "gptjax"]) == 2
    assert "which exists" in capsys.readouterr().err


def test_extra_heads_are_left_out_and_named(tokenizer, tmp_path, capsys):
    lm = make(MultiTokenConfig(320, 2, 32, 4, kv_heads=2, hidden=64, ahead=2), tokenizer)
    lm.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf")
    assert capsys.readouterr().out.startswith("without its extra heads (2), which hf does not have\n")
    alone, back = lm.without_extra_heads(), gptjax.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, back.params, alone.params)
    np.testing.assert_allclose(back.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), rtol=1e-6)
    with pytest.raises(UserError, match=r"^model: got MultiTokenConfig, must be .*without_extra_heads\(\) may be one"):
        lm.save_hf(tmp_path / "other")


@pytest.mark.parametrize(("dtype", "code"), [("f32", "F32"), ("q8_0", "Q8_0")])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_from_transformers_to_llama_cpp(config, dtype, code, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf", reason="reads GGUF files: pip install gguf")
    lm = make(config, tokenizer)
    lm.save_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", "--to", "gguf", "--dtype", dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    layer = {"attn_norm", "ffn_norm", "ffn_up", "ffn_down", "attn_output"}
    more = {"attn_qkv"} if config is GPT2 else {"attn_q", "attn_k", "attn_v", "ffn_gate"}
    assert {name.split(".")[2] for name in found if name.startswith("blk.1.")} == layer | more
    embedding, kind = found["token_embd.weight"], gguf.GGMLQuantizationType[code]
    assert embedding.tensor_type == kind
    assert embedding.data.tobytes() == gguf.quantize(lm.params["embedding"], kind).tobytes()
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == config.vocab
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_from_llama_cpp_to_transformers(config, tokenizer, tmp_path, capsys):
    lm = make(config, tokenizer)
    lm.save_gguf(tmp_path / "model.gguf", "f32")
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    back = gptjax.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)
    assert back.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert (back.tokenizer.bos, back.tokenizer.eos, back.context) == (tokenizer.bos, tokenizer.eos, 48)
    capsys.readouterr()
    arguments = ["--prompt", "To be", "--temperature", "0", "--max-tokens", "4"]
    assert main(["generate", str(tmp_path / "model.gguf"), *arguments]) == 0
    assert capsys.readouterr().out.rstrip("\n") == lm.generate("To be", 4, temperature=0)[0].text


def test_an_adapter_is_merged_on_the_way(tokenizer, tmp_path):
    lm, lora = make(LLAMA, tokenizer), LoRA(rank=2, match=("q", "down"))
    adapters = jax.tree.map(
        lambda x: x + 0.1, lora.init(jax.random.key(0), lm.params, parameter_info(lm.config.build()))
    )
    peft.write(tmp_path / "adapter", lora, adapters, LLAMA)
    lm.save_hf(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "merged", "--to", "gptjax", "--adapter", tmp_path / "adapter")
    merged = gptjax.load(tmp_path / "merged").params
    jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(lm.params, adapters))
    assert not np.array_equal(merged["blocks"]["mlp"]["down"], lm.params["blocks"]["mlp"]["down"])


def test_from_llama2c(tokenizer, tmp_path):
    """In version 0 layers of one kind follow one another; `tests/interop/test_llama2c.py` has the rest."""
    rng = np.random.default_rng(0)
    D, F, L, N, V, T = 32, 64, 2, 4, 320, 48
    shapes = [(V, D), (L, D), *[(L, D, D)] * 4, (L, D), (L, F, D), (L, D, F), (L, F, D), (D,), (T, D // N)]
    arrays = [rng.normal(size=shape).astype("f") for shape in shapes]
    header = struct.pack("<7i", D, F, L, N, N, V, T)
    (tmp_path / "model.bin").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    tokenizer.save(tmp_path)
    convert(tmp_path / "model.bin", tmp_path / "ours", "--to", "gptjax")
    lm = gptjax.load(tmp_path / "ours")
    np.testing.assert_array_equal(lm.params["embedding"], arrays[0])
    np.testing.assert_array_equal(lm.params["blocks"]["mlp"]["up"], arrays[9].swapaxes(1, 2))
    assert lm.context == T
    assert lm.generate("To be", 4, temperature=0) == gptjax.load(tmp_path / "model.bin").generate(
        "To be", 4, temperature=0
    )
