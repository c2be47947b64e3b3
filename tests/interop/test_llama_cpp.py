"""The real llama.cpp reads our GGUF files: the same ids for a text and for a conversation, the same greedy tokens."""

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
from test_tokenizer_folders import LIBRARY

from gptjax.data.chat import conversation
from gptjax.data.tokenizers import CHAT_SPECIALS, HuggingFaceTokenizer, TiktokenTokenizer, TrainSentencePiece
from gptjax.data.tokenizers.tiktoken import CL100K_PATTERN, _lines
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.templates import ChatTemplate
from gptjax.interop.tokenizers import load, save
from gptjax.models.language_model import LanguageModel
from gptjax.nn import GELU, LayerNorm, LearnedPositions, MultiHeadAttention, RMSNorm, TransformerConfig
from gptjax.types import UserError

pytest.importorskip("tokenizers")
SIZES = {"layers": 2, "width": 32, "heads": 4, "hidden": 64}
LLAMA = {**SIZES, "kv_heads": 2}
QWEN3 = {**LLAMA, "attention": MultiHeadAttention(qk_norm=RMSNorm())}
GPT2 = {**SIZES, "positions": LearnedPositions(128), "norm": LayerNorm(), "mlp": GELU(), "bias": True}
TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALKS = (
    [{"role": "user", "content": "def f(x):"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "é  12345\n\n"},
    ],
)
TEXTS = ("def decode(self, s):\n    return 1234", " a  b ", "héllo 日本 \n\n\tx")


def sentencepiece(folder: Path):
    return TrainSentencePiece(vocab=420).build(iter(LIBRARY))


def sentencepiece_as_json(folder: Path):
    """As `save_hf` writes it, and `load` reads it."""
    save(sentencepiece(folder), folder / "json", 64)
    return load(folder / "json")


def ranks(folder: Path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"  ", b"12", b"123", b"de", b"def"]
    lines = _lines({token: i for i, token in enumerate(tokens)})
    return TiktokenTokenizer(lines, {"<|endoftext|>": 300, "<|end|>": 300}, CL100K_PATTERN).with_specials()


def byte_level(folder: Path):
    """With added tokens that are special and not, in turns, which its template writes."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(LIBRARY, vocab_size=400, show_progress=False)
    for name in ("<bos>", "<user>", "<end>", "<assistant>", "<system>"):
        special = name in ("<bos>", "<end>", "<system>")
        (made.add_special_tokens if special else made.add_tokens)([tokenizers.AddedToken(name, normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<end>"}))
    return HuggingFaceTokenizer.from_file(folder / "tokenizer.json")


CASES = {
    "llama": (LLAMA, sentencepiece, None),
    "llama by tokenizer.json": (LLAMA, sentencepiece_as_json, None),
    "qwen3 with a template": (QWEN3, byte_level, TURNS),
    "gpt2 by ranks": (GPT2, ranks, None),
}


@pytest.mark.sampled
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="asks llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_reads_and_writes_the_same(case, tmp_path):
    fields, make, source = CASES[case]
    tokenizer = make(tmp_path)
    config = TransformerConfig(vocab=tokenizer.vocab + 3, **fields)
    init = config.build().init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), jnp.float32), shapes)
    template = None if source is None else ChatTemplate(source, {"bos_token": "<bos>"})
    lm = LanguageModel(config, params, tokenizer, context=128, template=template)
    lm.save_gguf(tmp_path / "model.gguf", "f32")

    prompts = [tokenizer.encode(text) for text in TEXTS]
    asked = {"texts": TEXTS, "prompts": prompts, "talks": TALKS, "tokens": 16}
    program = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(tmp_path / "model.gguf")]
    done = subprocess.run(program, input=json.dumps(asked), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2_000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["texts"] == prompts
    assert found["talks"] == [lm.encode_chat(conversation(talk)) for talk in TALKS]
    for talk, (text, length) in zip(TALKS, found["answers"], strict=True):
        assert length == len(lm.encode_chat(conversation(talk)))
        assert text.strip() == lm.chat(talk, 16, temperature=0).content.strip()  # llama.cpp trims an answer
    for ids, continued in zip(prompts, found["continued"], strict=True):
        logits = np.asarray(lm.logits([[*ids, *continued]]))[0, len(ids) - 1 : -1, : tokenizer.vocab]
        assert logits.argmax(-1).tolist() == continued


def test_a_normaliser_that_gguf_cannot_express_is_refused(tmp_path):
    tokenizer = byte_level(tmp_path)

    def normalised(normalizer):
        spec = json.loads(tokenizer.data)
        data = json.dumps({**spec, "normalizer": normalizer}).encode()
        return gguf_tokenizer.metadata(HuggingFaceTokenizer(data, tokenizer.specials), tokenizer.vocab)

    plain = normalised(None)
    assert normalised({"type": "Sequence", "normalizers": []}) == plain
    for refused in (
        {"type": "NFKC"},
        {"type": "Lowercase"},
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]},
    ):
        with pytest.raises(UserError, match=r"^tokenizer: got the normaliser \{.*, which a GGUF file cannot express$"):
            normalised(refused)
    with pytest.warns(UserWarning, match="got the normaliser NFC, which llama.cpp lacks"):
        assert normalised({"type": "NFC"}) == plain
    pieces = sentencepiece_as_json(tmp_path)
    spec = json.loads(pieces.data)
    lower = json.dumps({**spec, "normalizer": {"type": "Lowercase"}}).encode()
    with pytest.raises(UserError, match="got the normaliser"):
        gguf_tokenizer.metadata(HuggingFaceTokenizer(lower, pieces.specials), pieces.vocab)


def test_a_model_with_our_format_says_so(tmp_path):
    import gguf

    tokenizer = sentencepiece(tmp_path)
    assert set(CHAT_SPECIALS) <= tokenizer.specials.keys()
    config = TransformerConfig(vocab=tokenizer.vocab, **LLAMA)
    params = jax.jit(config.build().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    LanguageModel(config, params, tokenizer).save_gguf(tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert "<|assistant|>" in fields["tokenizer.chat_template"].contents()
