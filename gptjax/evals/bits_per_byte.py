"""Bits per byte of held-out text, beside those of `xz -9`.

A language model is a compressor: an arithmetic coder driven by it spends -log2 p(token) bits on each token. Bits per
byte of text compare models with different tokenizers, and with a standard compressor.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.data.encoding import held_out
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.distributed.sharding import DEFAULT_RULES, ShardingRules
from gptjax.evals import likelihood
from gptjax.protocols import Evaluation, ModelConfig, Source, Split, Tokenizer
from gptjax.types import Params, Result, UserError


@dataclasses.dataclass(frozen=True)
class BitsPerByte(Evaluation):
    """Bits per byte and perplexity of held-out text: `BitsPerByte(source)(language_model) -> Result`.

    Intervals count documents: tokens of one document are not independent."""

    source: Source[str]
    """Source of the texts."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of documents, the first of the split. None: all."""
    length: int = 256
    """Context length, in tokens."""
    stride: int | None = None
    """Distance of two windows of a longer document, in tokens: all but the first tokens have at least length - stride
    tokens of context. None: length / 2. 1: as much context as there can be, at length times the work."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length: got {self.length}, must be at least 1")
        if self.stride is not None and not 1 <= self.stride <= self.length:
            raise UserError(f"stride: got {self.stride}, must be 1 to {self.length}, the length")

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, str)

    def __call__(self, model: Any) -> Result:
        documents = held_out(self.source, self.split, self.documents, str)
        found = log_likelihoods(
            model.config, model.params, model.tokenizer, documents, self.length, self.stride, rules=model.rules
        )
        nats, tokens = [-each.logprob for each in found], [each.tokens for each in found]
        text = [document.encode() for document in documents]
        size, words = sum(map(len, text)), [len(document.split()) for document in documents]
        if size == 0:
            raise UserError(f"source: {self.source} has no text in its {self.split} split to evaluate on")
        xz = 8 * len(lzma.compress(b"\n".join(text), preset=9)) / size
        total = math.fsum(nats)
        values = {"bits_per_byte": total / math.log(2) / size, "xz_bits_per_byte": xz}
        values |= {"nats_per_token": total / sum(tokens), "perplexity_per_token": _exp(total / sum(tokens))}
        if sum(words):
            values["perplexity_per_word"] = _exp(total / sum(words))
        for name, counts in (
            ("bits_per_byte", [len(document) for document in text]),
            ("perplexity_per_token", tokens),
            ("perplexity_per_word", words),
        ):
            if sum(count > 0 for count in counts) > 1:
                ends = interval(nats, counts)
                scaled = [x / math.log(2) if name == "bits_per_byte" else _exp(x) for x in ends]
                values |= dict(zip((f"{name}_low", f"{name}_high"), scaled, strict=True))
        values |= {"bytes": size, "tokens": sum(tokens), "documents": len(documents)}
        return Result("Held-out text", values, self._markdown(values))

    def _markdown(self, values: dict[str, float]) -> str:
        def shown(name: str, digits: int) -> str:
            low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
            return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"

        bits, xz = values["bits_per_byte"], values["xz_bits_per_byte"]
        by_word = values.get("perplexity_per_word")
        verdict = "better" if bits < xz else "worse"
        return (
            f"**{bits:.3f} bits per byte**{shown('bits_per_byte', 3)} on {values['documents']:,} held-out documents "
            f"({values['bytes']:,} bytes, {values['tokens']:,} tokens); `xz -9` needs {xz:.3f} for the same bytes: "
            f"the model is the {verdict} compressor. Perplexity per token: {values['perplexity_per_token']:.2f}"
            f"{shown('perplexity_per_token', 2)}"
            + ("." if by_word is None else f", per word: {by_word:.2f}{shown('perplexity_per_word', 2)}.")
        )


def interval(sums: Sequence[float], counts: Sequence[int], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of r = sum(sums) / sum(counts), values with known sums in G > 1 documents: r +- t * SE with

        SE^2 = G / (G - 1) * sum_d (sum_d - r count_d)^2 / sum(counts)^2

    which is that of `gptjax.evals.intervals`, with documents as clusters of tokens."""
    from scipy.special import stdtrit

    x, n = np.array([each for each in zip(sums, counts, strict=True) if each[1]], np.float64).T
    ratio, documents = float(x.sum() / n.sum()), len(x)
    residuals = x - ratio * n
    error = math.sqrt(documents / (documents - 1) * float(residuals @ residuals)) / float(n.sum())
    half = float(stdtrit(documents - 1, (1 + level) / 2)) * error
    return ratio - half, ratio + half


def _exp(x: float) -> float:
    """Perplexity of `x` nats; the largest float for more than a float can hold."""
    return math.exp(min(x, 700.0))


def log_likelihoods(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    length: int,
    stride: int | None = None,
    batch: int = likelihood.TOKENS,
    rules: ShardingRules = DEFAULT_RULES,
) -> list[likelihood.Likelihood]:
    """Log-likelihood of each document and the number of tokens counted.

    It runs on the mesh of the parameters, sharded by `rules`, in batches of `batch` tokens.

    Every token of every document is counted once, `eos` included, each document by itself. Documents longer than
    `length` are read in windows that overlap: all but the first tokens have at least length - stride tokens of context.
    """
    limit = config.max_positions
    length = min(length, limit) if limit else length
    stride = max(length // 2, 1) if stride is None else min(stride, length)
    encoded = tokenizer.encode_batch(documents)
    windows = [
        (document, window)
        for document, ids in enumerate(encoded)
        for window in _windows(add_bos_eos(ids, tokenizer), length, stride)
    ]
    found = [likelihood.Likelihood(0.0, True, 0)] * len(encoded)
    scored = likelihood.score(config, params, [window for _, window in windows], rules, batch)
    for (document, _), (logprob, greedy, tokens) in zip(windows, scored, strict=True):
        before = found[document]
        together = before.logprob + logprob, before.greedy and greedy, before.tokens + tokens
        found[document] = likelihood.Likelihood(*together)
    return found


def _windows(ids: list[int], length: int, stride: int) -> Iterator[likelihood.Continuation]:
    """Windows of at most length + 1 ids, `stride` apart; the last ids of each are new."""
    if len(ids) > 1:
        yield likelihood.Continuation(tuple(ids[:1]), tuple(ids[1 : length + 1]))
    for end in range(length + 1, len(ids), stride):
        new = tuple(ids[end : end + stride])
        yield likelihood.Continuation(tuple(ids[max(end + len(new) - length - 1, 0) : end]), new)
