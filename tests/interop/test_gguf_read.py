"""GGUF files are read as they were written, by us and by llama.cpp's own package, and damaged ones are refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from test_gguf_architectures import CASES, config_of, random_model
from test_llama_cpp import CASES as TEXT_CASES
from test_llama_cpp import TALKS, TEXTS

import gptjax
from gptjax.data.chat import conversation, prompt
from gptjax.data.tokenizers import load_tokenizer
from gptjax.interop.gguf import container, read_tokenizer
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf.encodings import BY_NUMBER, ENCODINGS
from gptjax.interop.gguf.read import read
from gptjax.interop.huggingface import to_tensors
from gptjax.interop.templates import ChatTemplate
from gptjax.types import UserError

BLOCKS = [encoding for encoding in ENCODINGS if encoding.decode is not None]


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_what_was_written_is_read(case, tmp_path):
    """The same parameters and ids, and the same file when it is written again. Gemma's scales are one less than the
    file's, which rounds them."""
    lm = random_model(case, tmp_path)
    lm.save_gguf(tmp_path / "model.gguf", "f32")
    again = gptjax.load(tmp_path / "model.gguf")
    atol = 2**-24 if case.startswith("gemma") else 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), again.params, lm.params)
    if case == "phi3 long":  # the short factors are taken first, as from a folder
        again = again.for_context_length(256)
    ids = [list(range(40))]
    np.testing.assert_allclose(again.logits(ids), lm.logits(ids), rtol=0, atol=1e-5 if atol else 0)
    assert [again.tokenizer.encode(text) for text in TEXTS] == [lm.tokenizer.encode(text) for text in TEXTS]
    assert again.stop_token_ids == (lm.tokenizer.eos,)
    (tmp_path / "again").mkdir()
    again.save_gguf(tmp_path / "again/model.gguf", "f32")
    assert (tmp_path / "again/model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize("case", TEXT_CASES)
def test_texts_and_conversations_become_the_same_ids(case, tmp_path):
    _, make, source = TEXT_CASES[case]
    tokenizer = make(tmp_path)
    template = None if source is None else ChatTemplate(source, {"bos_token": "<bos>"})
    keys = gguf_tokenizer.metadata(tokenizer, tokenizer.vocab + 3)
    if source is not None:
        keys["tokenizer.chat_template"] = source
    found, written, ends = read_tokenizer.read(keys, tokenizer.vocab + 3)
    for messages in map(conversation, TALKS):
        sides = ((tokenizer, template), (found, written))
        ids = [turns.prompt(messages, text) if turns else prompt(messages, text) for text, turns in sides]
        assert ids[0] == ids[1]
    assert found.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert [found.decode(ids) for ids in found.encode_batch(TEXTS)] == [*TEXTS]
    bos = tokenizer.bos if keys["tokenizer.ggml.add_bos_token"] else None
    assert (found.bos, found.eos, found.vocab) == (bos, tokenizer.eos, tokenizer.vocab)
    assert tokenizer.eos in (ends or ())
    keys |= {} if bos is not None else {"tokenizer.ggml.bos_token_id": found.bos}
    again = gguf_tokenizer.metadata(found, tokenizer.vocab + 3)
    assert {key: value for key, value in keys.items() if value != again.get(key)}.keys() <= {"tokenizer.chat_template"}


@pytest.mark.sampled
@pytest.mark.real
@pytest.mark.parametrize("name", ["gpt2/tokenizer.json", "cl100k_base.tiktoken", "mistral_v1.sentencepiece.model"])
def test_published_tokenizers_come_back(shared, name):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    keys = gguf_tokenizer.metadata(tokenizer, tokenizer.vocab)
    found, _, _ = read_tokenizer.read(keys, tokenizer.vocab)
    plays = (shared / "data" / "tinyshakespeare.txt").read_text()
    text = plays[:20_000] + "  \n\n 12345 don't DON'T über 日本語 \t😀 x=[1,2]"
    assert found.encode(text) == tokenizer.encode(text)
    assert (found.bos, found.eos) == (tokenizer.bos if keys["tokenizer.ggml.add_bos_token"] else None, tokenizer.eos)


@pytest.mark.parametrize("encoding", BLOCKS, ids=lambda encoding: encoding.name)
def test_blocks_are_decoded_as_by_llama_cpps_package(encoding):
    """To the bit, for all bytes; scales are finite, as is all arithmetic then."""
    gguf = pytest.importorskip("gguf")
    draw = np.random.default_rng(0)
    stored = draw.integers(0, 256, (5_000, encoding.size), dtype=np.uint8).reshape(-1).view(encoding.block)
    for scale in {"d", "m"} & set(encoding.block.names):
        stored[scale] = draw.normal(size=len(stored))
    if encoding.name == "mxfp4":
        stored["scale"] = draw.integers(0, 250, len(stored))
    kind = gguf.GGMLQuantizationType[encoding.name.upper()]
    assert encoding.block.itemsize == gguf.GGML_QUANT_SIZES[kind][1]
    assert BY_NUMBER[int(kind)] is encoding
    expected = gguf.dequantize(stored.view(np.uint8).reshape(len(stored), -1), kind)
    np.testing.assert_array_equal(encoding.read(stored.view(np.uint8)), expected.reshape(-1))


def test_a_file_of_another_program_is_read(tmp_path):
    """One that llama.cpp's package writes: keys of other number types, several types of tensors, LlamaForCausalLM's
    defaults left out, the alignment another."""
    gguf = pytest.importorskip("gguf")
    config = config_of("llama", {**CASES["mixtral"], "hidden_size": 64, "vocab_size": 280, "intermediate_size": 96})
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), np.zeros((1, 4), int))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)
    _, tensors = to_tensors(config, params)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_uint64("llama.embedding_length", 64)
    writer.add_int32("llama.feed_forward_length", 96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string("general.license", "of no matter")
    writer.add_array("general.tags", ["a", "b"])
    kinds = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32")
    expected = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for number, (name, x) in enumerate(tensors.items()):
        rows = (
            x.reshape(x.shape[0] // 16, 2, 8, -1).swapaxes(1, 2).reshape(x.shape)
            if ".q_" in name or ".k_" in name
            else x
        )
        kind = gguf.GGMLQuantizationType["F32" if x.ndim == 1 else kinds[number % len(kinds)]]
        data = gguf.quantize(np.ascontiguousarray(rows), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
        values = gguf.dequantize(data, kind).reshape(x.shape)
        back = values.reshape(-1, 8, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape) if rows is not x else values
        expected[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields_again, found, text = read(tmp_path / "model.gguf")
    assert text.tokenizer.kind == "missing"
    assert fields_again["model_type"] == "llama"
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), values, err_msg=name)
    lm = gptjax.load(tmp_path / "model.gguf", dtype="float32")
    assert lm.logits([[1, 2, 3]]).shape == (1, 3, 280)


def test_floats_keep_their_dtype(tmp_path):
    lm = random_model("llama", tmp_path)
    for dtype, expected in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("q4_0", np.float32)):
        lm.save_gguf(tmp_path / f"{dtype}.gguf", dtype)
        again = gptjax.load(tmp_path / f"{dtype}.gguf")
        assert again.params["head"].dtype == expected
        assert again.config.dtype == ("bfloat16" if dtype == "bf16" else "float32")
    assert gptjax.load(tmp_path / "q4_0.gguf", dtype="bfloat16").params["head"].dtype == ml_dtypes.bfloat16


def written(metadata, stored):
    """A file with this metadata and these tensors."""
    head = container.header(metadata, [(name, x.shape, x.encoding) for name, x in stored.items()])
    parts = [head, *(x.data.tobytes() for x in stored.values())]
    return b"".join(part + bytes(-len(part) % 32) for part in parts)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    lm = random_model("llama 3", folder)
    lm.save_gguf(folder / "model.gguf", "q8_0")
    return folder / "model.gguf"


CHANGES = [
    ({"general.architecture": "mamba"}, "general.architecture: got 'mamba', must be one of llama, qwen2"),
    ({"llama.attention.scale": 0.5}, "llama.attention.scale: got 0.5, which gptjax does not know"),
    ({"llama.block_count": 2_000_000_000}, "llama.block_count: got 2000000000, which is more than the file has"),
    ({"llama.embedding_length": 10**9}, "metadata: hidden_size: got 1000000000, which is more than the file has"),
    ({"llama.block_count": 4}, "tensors: missing blk.3.attn_k.weight"),
    ({"llama.block_count": 2}, "tensors: unexpected blk.2.attn_k.weight"),
    ({"llama.attention.head_count": 0}, "metadata: num_attention_heads: got 0, must be an integer from 1"),
    ({"llama.attention.head_count": 2}, "attn_q.weight: got shape .*, must be .* by the metadata|must divide"),
    ({"llama.rope.scaling.type": "yarn"}, "original_context_length: got none, which a model"),
    ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base: got nan, must be a finite number"),
    ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base: got 0.0, must be more than 1"),
    ({"split.count": 3}, "one of 3 parts; merge them"),
    ({"general.type": "adapter"}, "general.type: got 'adapter', must be model"),
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: got 'bert', must be llama"),
    ({"tokenizer.ggml.pre": "deepseek-v3"}, "tokenizer.ggml.pre: got 'deepseek-v3', must be one of gpt-2"),
    ({"tokenizer.ggml.merges": ["a"]}, "tokenizer.ggml.merges: got one without two parts"),
    ({"tokenizer.ggml.merges": ["x 日"]}, "tokenizer.ggml.merges: got one of tokens that are not there"),
    ({"tokenizer.ggml.eos_token_id": 5_000}, "tokenizer.ggml.eos_token_id: got 5000, must be less than"),
    ({"tokenizer.ggml.add_eos_token": True}, "tokenizer.ggml.add_eos_token: got True, must be False"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_cannot_be_read_is_refused_by_name(sound, tmp_path, change, message):
    metadata, stored = container.read(sound)
    (tmp_path / "model.gguf").write_bytes(written(metadata, stored))
    assert (tmp_path / "model.gguf").read_bytes() == sound.read_bytes()
    (tmp_path / "model.gguf").write_bytes(written({**metadata, **change}, stored))
    with pytest.raises(UserError, match=message):
        gptjax.load(tmp_path / "model.gguf")


def damaged(data, message, tmp_path):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_a_folder_of_gguf_files_names_them(sound):
    with pytest.raises(UserError, match=r"which has no config.json; load the file .*model.gguf$"):
        gptjax.load(sound.parent)


def test_damage_is_one_line_and_takes_no_memory(sound, tmp_path):
    whole = sound.read_bytes()
    for size in (0, 3, 23, 24, 100, 5_000, len(whole) // 2, len(whole) - 32):
        damaged(whole[:size], "a damaged GGUF file", tmp_path)
    damaged(whole[:4] + struct.pack("<I", 1) + whole[8:], "of version 1, must be 2 or 3", tmp_path)
    damaged(whole[:4] + struct.pack(">I", 3) + whole[8:], "must be 2 or 3 and little-endian", tmp_path)
    for place in (8, 16):  # numbers of tensors and keys
        damaged(
            whole[:place] + struct.pack("<Q", 2**60) + whole[place + 8 :], "cannot hold 1152921504606846976", tmp_path
        )
    name = struct.pack("<Q", 17) + b"token_embd.weight"
    start = whole.index(name) + len(name)
    axes, columns, rows, kind, offset = struct.unpack_from("<IQQIQ", whole, start)
    assert (axes, columns, kind) == (2, 32, 8)

    def table(*values):
        return whole[:start] + struct.pack("<IQQIQ", *values) + whole[start + 32 :]

    damaged(table(9, columns, rows, kind, offset), "has 9 axes", tmp_path)
    damaged(table(2, 2**62, 2**62, kind, offset), "are not where the file has any", tmp_path)
    damaged(table(2, 33, rows, kind, offset), "has the shape .*, in blocks of 32", tmp_path)
    damaged(table(2, columns, rows, 23, offset), "got the type iq4_xs, must be one of f32", tmp_path)
    damaged(table(2, columns, rows, 99, offset), "got the type number 99, must be one of f32", tmp_path)
    damaged(table(2, columns, rows, kind, offset + 32), "are another's", tmp_path)
    damaged(table(2, columns, rows, kind, 2**63), "are not where the file has any", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_one_line(seed, tmp_path):
    """Cut files, changed bytes and extreme values of every key: a UserError of one line, or a model."""
    cases = ("llama 3", "gemma3_text", "phi3 long", "deepseek_v3 yarn", "gpt2", "gpt_oss")
    draw = random.Random(seed)
    extremes = [0, 1, 3, 2**31 - 1, 2**32 - 1, -1.0, 1e-30, 1e30, float("nan"), float("inf"), "", "x" * 50, True]
    extremes += [["a"], [1], [1.5], []]
    for case in cases:
        folder = tmp_path / case
        folder.mkdir()
        random_model(case, folder).save_gguf(folder / "model.gguf", "q8_0")
        metadata, stored = container.read(folder / "model.gguf")
        whole = (folder / "model.gguf").read_bytes()
        for _ in range(15):
            kind, data = draw.randrange(3), bytearray(whole)
            if kind == 0:
                data = data[: draw.randrange(len(data))]
            elif kind == 1:
                for _ in range(draw.randint(1, 4)):
                    data[draw.randrange(min(len(data), 30_000))] = draw.randrange(256)
            else:
                key, value = draw.choice([*metadata]), draw.choice(extremes)
                data = written({**metadata, key: value}, stored)
            file = Path(folder / "x.gguf")
            file.write_bytes(data)
            message = ""
            try:
                _, tensors, text = read(file)
                text.tokenizer.encode("hello")
                for name in tensors:
                    np.asarray(tensors[name])
            except UserError as error:
                message = str(error)
            assert "\n" not in message
