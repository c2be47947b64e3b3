"""Law of word-by-word encoding: the ids are those of the library, for every kind of character."""

from __future__ import annotations

import json
import random
import unicodedata

import pytest

from gptjax.data.tokenizers import words
from gptjax.data.tokenizers.huggingface import HuggingFaceTokenizer

TEXTS = ["Which of these isn't 12 or 3rd?\n\n  It's they'll, x='s'", "Größe naïve 北京 ½ ٣"] * 9


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(TEXTS, vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    return HuggingFaceTokenizer(library.to_str().encode(), {"<|end|>": 0})


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def characters() -> list[str]:
    """The first and the last character of each run of one class, those beside them, and others."""
    kinds = [words._kind(code, unicodedata.category) for code in range(0x10000)]
    changes = {code for code in range(1, len(kinds)) if kinds[code] != kinds[code - 1]}
    chosen = changes | {code - 1 for code in changes} | {*random.Random(0).sample(range(0x110000), 500)}
    return [chr(code) for code in sorted(chosen) if not 0xD800 <= code < 0xE000]


def test_ids_are_the_librarys(tokenizer, one_thread):
    found = [f"a{c}b 1{c}2 .{c}! {c}{c}x  {c} \n{c}'s'{c}" for c in characters()]
    mixed = random.Random(1)
    alphabet = [*"ab1 \n\t'\u00a0\u3000,.é北½\u0301\x1c\u200b\U0001f600\ud800", "'ll", " the", "<|end|>"]
    found += ["".join(mixed.choices(alphabet, k=30)) for _ in range(500)]
    expected = [tokenizer.encode(text) for text in found]
    assert tokenizer._words is not None
    assert tokenizer.encode_batch(found) == expected
    assert tokenizer.encode_batch(found) == expected
    assert sum(words._words(text) is not None for text in found) > 500


def test_a_word_is_encoded_once(monkeypatch):
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[*text.encode()] for text in texts]

    cache = words.Words(encode)
    for _ in range(2):
        assert cache.encode_batch(["one two two", "\U0001f600 two", ""]) == [
            [*b"one two two"],
            [*"\U0001f600 two".encode()],
            [],
        ]
    assert sorted(asked) == sorted(["one", " two", "\U0001f600 two", "\U0001f600 two"])
    monkeypatch.setattr(words, "MOST", 1)
    cache.encode_batch(["three"])
    assert [*cache._known] == ["three"]


def test_other_patterns_are_left_to_the_library(tokenizer):
    spec = json.loads(tokenizer.data)
    assert words.splits(spec)
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [spec["pre_tokenizer"]]}},
        {"pre_tokenizer": None},
        {"model": spec["model"] | {"dropout": 0.1}},
        {"added_tokens": [*spec["added_tokens"], {"id": 400, "content": " of", "special": False}]},
    ):
        assert not words.splits(spec | change)
