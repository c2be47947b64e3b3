"""Tokenizers in the publishers' own files: Llama 3's ranks, Mistral's tekken.json and tokenizer.model.v3."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from test_tokenizer_folders import LIBRARY, TEXTS, ranks

from gptjax.data.tokenizers import SentencePieceTokenizer, TiktokenTokenizer, TrainSentencePiece, load_tokenizer
from gptjax.data.tokenizers.tiktoken import LLAMA3_PATTERN, LLAMA3_SIZE, O200K_PATTERN, TEKKEN_SPECIALS
from gptjax.interop.tokenizer_json import reader
from gptjax.interop.tokenizers import load
from gptjax.types import UserError

tiktoken = pytest.importorskip("tiktoken")
PIECES = sorted(ranks()._ranks, key=ranks()._ranks.__getitem__)


def llama3(folder: Path, count: int = 0) -> Path:
    """A tokenizer.model with these ranks, and more so that there are `count`."""
    more = [b"\xff" + i.to_bytes(3, "big") for i in range(count - len(PIECES))]
    lines = (base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate([*PIECES, *more]))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder / "tokenizer.model"


def tekken(folder: Path, **changes) -> Path:
    config = {"pattern": O200K_PATTERN, "default_num_special_tokens": 30, "default_vocab_size": 30 + len(PIECES)}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(piece).decode()} for i, piece in enumerate(PIECES)]
    beyond = {"rank": len(PIECES), "token_bytes": base64.b64encode(b"beyond").decode(), "token_str": "beyond"}
    content = {"config": config, "vocab": [*vocab, beyond], **changes}
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder / "tekken.json"


def expected(pattern: str, text: str, first: int = 0) -> list[int]:
    own = {piece: i for i, piece in enumerate(PIECES)}
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=own, special_tokens={})
    return [first + i for i in encoding.encode_ordinary(text)]


def test_llama_3(tmp_path: Path):
    file = llama3(tmp_path)
    named = {str(len(PIECES) + i): {"content": name} for i, name in enumerate(("<s>", "</s>", "<|eot_id|>"))}
    settings = {"added_tokens_decoder": named, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    assert load_tokenizer(file).specials == {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(tmp_path, 400)
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert tokenizer.encode_batch(TEXTS) == [expected(LLAMA3_PATTERN, text) for text in TEXTS]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab) == (len(PIECES), len(PIECES) + 1, len(PIECES) + 3)
    assert reader(tokenizer).encode("<|eot_id|>", add_special_tokens=False).ids == [len(PIECES) + 2]
    for text in TEXTS[:20]:
        assert reader(tokenizer).encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_llama_3s_special_tokens_follow_its_ranks(tmp_path: Path):
    tokenizer = load_tokenizer(llama3(tmp_path, LLAMA3_SIZE))
    ids = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
    ids |= {"<|eot_id|>": 9, "<|reserved_special_token_5|>": 10, "<|reserved_special_token_250|>": 255}
    assert {name: tokenizer.specials[name] - LLAMA3_SIZE for name in ids} == ids
    assert (tokenizer.vocab, tokenizer.bos) == (LLAMA3_SIZE + 256, LLAMA3_SIZE)
    assert load(tmp_path).bos == LLAMA3_SIZE, "every text begins with it"


def test_tekken(tmp_path: Path):
    tokenizer = load_tokenizer(tekken(tmp_path))
    assert tokenizer.encode_batch(TEXTS) == [expected(O200K_PATTERN, text, first=30) for text in TEXTS]
    assert [tokenizer.specials[name] for name in TEKKEN_SPECIALS] == [*range(20)]
    assert tokenizer.specials["<SPECIAL_29>"] == 29
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab) == (1, 2, 30 + len(PIECES))
    assert load(tmp_path, 400).bos == 1
    for text in ("hello 123", *(text for text in TEXTS[:10] if "<unk>" not in text)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert reader(tokenizer).encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert reader(tokenizer).encode("[INST]", add_special_tokens=False).ids == [3]
    own = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}, {"rank": 2, "token_str": "[THINK]"}]
    assert load_tokenizer(tekken(tmp_path, special_tokens=own)).specials["[THINK]"] == 2
    for damage in ({"vocab": []}, {"config": {}}, {"special_tokens": [{"rank": 0}]}):
        with pytest.raises(UserError, match=r"must be a tekken.json; it is damaged"):
            load_tokenizer(tekken(tmp_path, **damage))


def test_a_sentencepiece_file_with_a_version(tmp_path: Path):
    tokenizer = TrainSentencePiece(vocab=420).build(iter(LIBRARY))
    (tmp_path / "tokenizer.model.v2").write_bytes(b"older")
    (tmp_path / "tokenizer.model.v3").write_bytes(tokenizer.data)
    for found in (load(tmp_path), load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model.v3")):
        assert isinstance(found, SentencePieceTokenizer)
        assert found.encode_batch(TEXTS[:20]) == tokenizer.encode_batch(TEXTS[:20])
    with pytest.raises(UserError, match="must be a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model.v2")
