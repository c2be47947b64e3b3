"""Sequence-to-sequence data: source texts, each with its target text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from gptjax.data.dataset import Dataset
from gptjax.data.encoding import Encode, Encoded, encoded
from gptjax.data.files import Where
from gptjax.data.packing import BestFit, Concatenate, Packing, Pieces, Plan, fill
from gptjax.data.sources import JsonRows
from gptjax.data.store import Store, combine
from gptjax.data.tokenizers.tokenizer import add_bos_eos, decoder_start
from gptjax.protocols import ModelConfig, Tokenizer
from gptjax.types import Batch, Json, Pair, UserError


@dataclasses.dataclass(frozen=True)
class TextPair:
    """A source text and its target text."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class PairsJsonl(JsonRows):
    """Source and target texts, one pair per line: `{"source": "The house is small.", "target": "Das Haus ist
    klein."}`. All pairs with one source are in one split."""

    source: str = "source"
    """Field with the source text."""
    target: str = "target"
    """Field with the target text."""

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, TextPair]]:
        source, target = (row.get(name) if isinstance(row, dict) else None for name in (self.source, self.target))
        if not (isinstance(source, str) and source and isinstance(target, str) and target):
            found = f"the fields {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f'path: {where}: got {found}, must be an object with texts in "{self.source}" and "{self.target}"'
            )
        return [(source, TextPair(source, target))]


@dataclasses.dataclass(frozen=True)
class Pairs(Dataset):
    """Source texts, each with its target text, for encoder-decoders. A data source is `PairsJsonl`.

    The encoder reads `bos? source eos`. The decoder is trained as in T5 (arXiv:1910.10683): its input is the target
    shifted right behind a start token, the tokenizer's `bos` or else its padding token.

        tokens   start t_1 .. t_n
        targets  t_1   t_2 .. eos
    """

    batch_type: ClassVar[type[Batch]] = Pair
    document_type: ClassVar[type | tuple[type, ...]] = TextPair
    separator: ClassVar[str] = "\n"

    packing: Packing = BestFit()
    """Packing of pairs into sequences: always whole pairs, each a segment in the source and in the target."""
    source_length: int | None = None
    """S, source tokens per sequence. None: `length`. Longer sources and targets are truncated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_length is not None and self.source_length < 1:
            raise UserError(f"source_length: got {self.source_length}, must be at least 1")
        if self.packing == Concatenate():
            raise UserError(f"packing: got {self.packing}, must be BestFit() or NoPacking(), which keep pairs whole")

    @property
    def S(self) -> int:
        """Source tokens per sequence."""
        return self.source_length or self.length

    def encodings(self) -> tuple[Encode, ...]:
        return (encode_sources, encode_targets)

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> PairedSequences:
        sources, targets = stores
        # Pack by the longer side, as a fraction of its sequence: then both sides fit.
        longest = np.maximum(
            np.minimum(np.diff(targets.offsets), self.length),
            -(-np.minimum(np.diff(sources.offsets), self.S) * self.length // self.S),
        )
        offsets = np.concatenate([[0], np.cumsum(longest)])
        plan = self.packing.plan(offsets, self.length)
        return PairedSequences(sources, targets, offsets, plan, self.length, self.S, decoder_start(tokenizer))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of the encoder's input."""
        return add_bos_eos(tokenizer.encode(text), tokenizer)

    def texts_of(self, document: TextPair) -> Iterable[str]:
        return (document.source, document.target)

    def empty(self, size: int) -> Pair:
        names = "source", "source_segments", "source_positions"
        sources = {name: np.zeros((size, self.S), np.int32) for name in names}
        return Pair(**vars(super().empty(size)), **sources)

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        limit = model.max_source_positions
        if limit is not None and limit < self.S:
            raise UserError(f"data.source_length: got {self.S}, must be at most {limit}, the encoder's positions")


def encode_sources(documents: Iterator[TextPair], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode sources as the encoder reads them."""
    for _, ids in encoded(documents, lambda pair: pair.source, tokenizer):
        yield Encoded(add_bos_eos(ids, tokenizer))


def encode_targets(documents: Iterator[TextPair], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode targets as the decoder predicts them."""
    if tokenizer.eos is None:
        raise UserError("tokenizer: got one without an eos token, must have one: it ends a target")
    for _, ids in encoded(documents, lambda pair: pair.target, tokenizer):
        yield Encoded([*ids, tokenizer.eos])


@dataclasses.dataclass(frozen=True)
class PairedSequences:
    """Sequences of packed pairs."""

    sources: Store
    targets: Store
    offsets: np.ndarray
    """int64 [D + 1]: offsets of the pairs in the stream that was packed."""
    plan: Plan
    length: int
    source_length: int
    start: int
    """Start token of the decoder."""

    @property
    def fingerprint(self) -> str:
        return combine(self.sources.fingerprint, self.targets.fingerprint)

    @property
    def tokens(self) -> int:
        return int(self.sources.offsets[-1] + self.targets.offsets[-1])

    def __len__(self) -> int:
        return len(self.plan)

    def fill(self, batch: Pair, at: np.ndarray, index: np.ndarray) -> None:
        pieces = self.plan.pieces(index)
        pair = np.searchsorted(self.offsets, pieces.start, "right") - 1
        unused = np.zeros((len(batch.source), self.source_length), np.int32)
        source = Batch(batch.source, unused, unused, batch.source_segments, batch.source_positions)
        for side, store, length in ((batch, self.targets, self.length), (source, self.sources, self.source_length)):
            size = np.diff(store.offsets)[pair]
            fill(side, at, store, Pieces(pieces.row, store.offsets[pair], np.minimum(size, length), size > length))
        targets, inside = np.array(batch.tokens)[at], np.asarray(batch.segments)[at] > 0
        read = np.where(np.asarray(batch.positions)[at] == 0, self.start, np.roll(targets, 1, axis=1))
        for field, values in ((batch.tokens, read * inside), (batch.targets, targets), (batch.weights, inside)):
            np.asarray(field)[at] = values
