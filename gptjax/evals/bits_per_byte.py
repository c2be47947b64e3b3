"""Bits per byte of held-out text, beside those of `xz -9`.

A language model is a compressor: an arithmetic coder driven by it spends -log2 p(token) bits on each token. Bits per
byte of text compare models with different tokenizers, and with a standard compressor.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
from collections.abc import Iterable, Iterator
from typing import Any

from gptjax.data.store import held_out
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.distributed.sharding import DEFAULT_RULES, ShardingRules
from gptjax.evals import likelihood
from gptjax.protocols import Evaluation, ModelConfig, Source, Split, Tokenizer
from gptjax.types import Params, Result, UserError


@dataclasses.dataclass(frozen=True)
class BitsPerByte(Evaluation):
    """Bits per byte of held-out text: `BitsPerByte(source)(language_model) -> Result`."""

    source: Source[str]
    """Source of the texts."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of documents, the first of the split. None: all."""
    length: int = 256
    """Context length, in tokens."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, str)

    def __call__(self, model: Any) -> Result:
        documents = held_out(self.source, self.split, self.documents, str)
        nats, tokens = negative_log_likelihood(
            model.config, model.params, model.tokenizer, documents, self.length, rules=model.rules
        )
        text = [document.encode() for document in documents]
        size = sum(map(len, text))
        if size == 0:
            raise UserError(f"source: {self.source} has no text in its {self.split} split to evaluate on")
        xz = 8 * len(lzma.compress(b"\n".join(text), preset=9)) / size
        bits = nats / math.log(2) / size
        values = {
            "bits_per_byte": bits,
            "xz_bits_per_byte": xz,
            "nats_per_token": nats / tokens,
            "bytes": size,
            "tokens": tokens,
            "documents": len(documents),
        }
        verdict = "better" if bits < xz else "worse"
        markdown = (
            f"**{bits:.3f} bits per byte** on {len(documents):,} held-out documents "
            f"({size:,} bytes, {tokens:,} tokens); `xz -9` needs {xz:.3f} for the same bytes: "
            f"the model is the {verdict} compressor."
        )
        return Result("Held-out text", values, markdown)


def negative_log_likelihood(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    length: int,
    batch: int = likelihood.TOKENS,
    rules: ShardingRules = DEFAULT_RULES,
) -> tuple[float, int]:
    """Total negative log-likelihood of the documents in nats, and the number of tokens counted.

    It runs on the mesh of the parameters, sharded by `rules`, in batches of `batch` tokens.

    Every token of every document is counted once, `eos` included, each document by itself. Documents longer than
    `length` are read in overlapping windows: all but the first tokens have at least length / 2 tokens of context.
    """
    limit = config.max_positions
    length = min(length, limit) if limit else length
    windows = [w for ids in tokenizer.encode_batch(documents) for w in _windows(add_bos_eos(ids, tokenizer), length)]
    scored = likelihood.score(config, params, windows, rules, batch)
    return -math.fsum(window.logprob for window in scored), sum(window.tokens for window in scored)


def _windows(ids: list[int], length: int) -> Iterator[likelihood.Continuation]:
    """Windows of at most length + 1 ids, half a window apart; the last ids of each are new."""
    if len(ids) > 1:
        yield likelihood.Continuation(tuple(ids[:1]), tuple(ids[1 : length + 1]))
    for end in range(length + 1, len(ids), stride := max(length // 2, 1)):
        new = tuple(ids[end : end + stride])
        yield likelihood.Continuation(tuple(ids[max(end + len(new) - length - 1, 0) : end]), new)
