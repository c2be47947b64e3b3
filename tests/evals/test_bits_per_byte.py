"""Bits per byte against plain numpy: every token counts once, each document by itself, in as much context as said."""

from __future__ import annotations

import dataclasses
import lzma
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax import data
from gptjax.evals import BitsPerByte
from gptjax.evals.bits_per_byte import log_likelihoods
from gptjax.models.language_model import LanguageModel
from gptjax.nn import LearnedPositions, Transformer, TransformerConfig
from gptjax.types import UserError

CONFIG = TransformerConfig(vocab=64, layers=2, width=16, heads=2, positions=LearnedPositions(32))
TOKENIZER = data.TrainCharacters().build(iter(["abcdefghijklmnopqrstuvwxyz é."]))
LENGTH = 16
SHORT = ("a", "hello there.", "", "fifteen letters")
LONG = tuple("".join(np.random.default_rng(n).choice(list("abcdefgé "), n)) for n in (16, 17, 25, 31, 100))


@dataclasses.dataclass(frozen=True)
class Texts:
    texts: tuple[str, ...]

    def documents(self, split: str) -> Iterator[str]:
        return iter(self.texts if split == "validation" else ())


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@jax.jit
def forward(params, tokens):
    return Transformer(CONFIG).apply({"params": params}, tokens)[0]


def in_numpy(params, ids: list[int], first: int) -> float:
    """-log p of `ids` from index `first` on, each given all before it, in nats."""
    padded = np.zeros((1, 32), np.int32)  # what follows changes nothing, and there is one shape to compile
    padded[0, : len(ids)] = ids
    logits = np.asarray(forward(params, padded)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -sum(logp[i - 1, ids[i]] for i in range(first, len(ids)))


def negative_log_likelihood(*arguments, **options) -> tuple[float, int]:
    found = log_likelihoods(*arguments, **options)
    return -sum(document.logprob for document in found), sum(document.tokens for document in found)


def framed(text: str) -> list[int]:
    return [TOKENIZER.specials["<|bos|>"], *TOKENIZER.encode(text), TOKENIZER.specials["<|end|>"]]


def test_short_documents_are_what_numpy_counts(params):
    nats, tokens = negative_log_likelihood(CONFIG, params, TOKENIZER, SHORT, 32, batch=3 * 32)
    assert tokens == sum(len(framed(text)) - 1 for text in SHORT)
    assert nats == pytest.approx(sum(in_numpy(params, framed(text), 1) for text in SHORT), rel=1e-5)


def test_windows_count_each_token_once_in_half_a_window_of_context_or_more(params):
    expected, count = 0.0, 0
    for text in LONG:
        ids = framed(text)
        ends = [min(LENGTH + 1, len(ids))]
        while ends[-1] < len(ids):
            ends.append(min(ends[-1] + LENGTH // 2, len(ids)))
        for start, end in zip([1, *ends], ends, strict=False):
            window = ids[max(0, end - LENGTH - 1) : end]
            assert start == 1 or len(window) - (end - start) > LENGTH // 2  # ids before the first that is counted
            expected += in_numpy(params, window, len(window) - (end - start))
            count += end - start
    nats, tokens = negative_log_likelihood(CONFIG, params, TOKENIZER, LONG, LENGTH)
    assert tokens == count == sum(len(framed(text)) - 1 for text in LONG)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_the_context_is_no_longer_than_the_positions(params):
    limited = negative_log_likelihood(CONFIG, params, TOKENIZER, LONG, 1000)
    assert limited == negative_log_likelihood(CONFIG, params, TOKENIZER, LONG, 32)


@pytest.mark.parametrize("texts", [SHORT, LONG])
def test_a_model_that_knows_nothing_spends_log_v_a_token(params, texts):
    nothing = jax.tree.map(np.zeros_like, params)
    result = BitsPerByte(Texts(texts), length=LENGTH)(LanguageModel(CONFIG, nothing, TOKENIZER))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(framed(text)) - 1 for text in texts)
    assert result.values["bits_per_byte"] == pytest.approx(tokens * math.log2(CONFIG.vocab) / size, rel=1e-6)
    assert result.values["nats_per_token"] == pytest.approx(math.log(CONFIG.vocab), rel=1e-6)
    assert (result.values["bytes"], result.values["tokens"]) == (size, tokens)
    assert result.values["documents"] == len(texts)
    compressed = lzma.compress("\n".join(texts).encode(), preset=9)
    assert result.values["xz_bits_per_byte"] == pytest.approx(8 * len(compressed) / size)
    assert f"{result.values['bits_per_byte']:.3f} bits per byte" in result.markdown


def test_no_text_is_a_mistake(params):
    with pytest.raises(UserError, match=r"^source: .* has no text in its validation split"):
        BitsPerByte(Texts(()))(LanguageModel(CONFIG, params, TOKENIZER))


def test_perplexities_and_their_intervals_count_documents(params):
    texts = SHORT + LONG
    stride = 3
    result = BitsPerByte(Texts(texts), length=LENGTH, stride=stride)(LanguageModel(CONFIG, params, TOKENIZER))
    nats, counts = [], []
    for text in texts:
        ids, total, start = framed(text), 0.0, 1
        for end in (LENGTH + 1, *range(LENGTH + 1 + stride, len(ids) + stride, stride)):
            end = min(end, len(ids))
            if end > start:
                window = ids[max(0, end - LENGTH - 1) : end]
                total, start = total + in_numpy(params, window, len(window) - (end - start)), end
        nats.append(total)
        counts.append(len(ids) - 1)
    words = [len(text.split()) for text in texts]
    assert result.values["perplexity_per_token"] == pytest.approx(np.exp(sum(nats) / sum(counts)), rel=1e-4)
    assert result.values["perplexity_per_word"] == pytest.approx(np.exp(sum(nats) / sum(words)), rel=1e-3)
    rate = sum(nats) / sum(counts)
    residuals = np.array(nats) - rate * np.array(counts)
    n = len(texts)
    half = stats.t.ppf(0.975, n - 1) * np.sqrt(n / (n - 1) * (residuals**2).sum()) / sum(counts)
    ends = result.values["perplexity_per_token_low"], result.values["perplexity_per_token_high"]
    np.testing.assert_allclose(np.log(ends), [rate - half, rate + half], rtol=1e-4)
    assert result.values["bits_per_byte_low"] < result.values["bits_per_byte"] < result.values["bits_per_byte_high"]
    with pytest.raises(UserError, match=r"^stride: got 17, must be 1 to 16"):
        BitsPerByte(Texts(texts), length=LENGTH, stride=17)
