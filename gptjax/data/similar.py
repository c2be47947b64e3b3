"""Pairs of similar texts, for embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from gptjax.data.dataset import Dataset
from gptjax.data.encoding import TRUNCATED, Encode, Encoded
from gptjax.data.packing import NoPacking, PackedSequences, Packing
from gptjax.data.pairs import TextPair
from gptjax.data.preferences import TwoPieces
from gptjax.data.store import Store
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import Tokenizer
from gptjax.types import Batch, SimilarPairs, UserError


@dataclasses.dataclass(frozen=True)
class Similar(Dataset):
    """Pairs of similar texts, such as a question and its answer, one pair per sequence: each text has positions from 0
    and does not see the other. A source is `PairsJsonl`. Each text is truncated to half of the length."""

    batch_type: ClassVar[type[Batch]] = SimilarPairs
    document_type: ClassVar[type | tuple[type, ...]] = TextPair

    packing: Packing = NoPacking()
    """Packing of pairs into sequences: one per sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing != NoPacking():
            raise UserError(f"packing: got {self.packing}, must be NoPacking(): a sequence has one pair")
        if self.length < 2:
            raise UserError(f"length: got {self.length}, must be at least 2, for two texts")

    def encodings(self) -> tuple[Encode, ...]:
        return (SimilarEncoder(self.length // 2),)

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> PackedSequences:
        (store,) = stores
        assert store.labels is not None
        return PackedSequences(store, TwoPieces(store.offsets, store.labels.astype(np.int64)))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Raises UserError: an embedder does not generate text."""
        raise UserError(f"prompts: got {text!r}, must be none: an embedder does not generate text")

    def texts_of(self, document: TextPair) -> Iterable[str]:
        return (document.source, document.target)

    def empty(self, size: int) -> SimilarPairs:
        return SimilarPairs(**vars(super().empty(size)))


@dataclasses.dataclass(frozen=True)
class SimilarEncoder:
    """Encoding of a pair as one document, both texts as in pretraining. Its label is the length of the first."""

    length: int
    """Maximum tokens of a text."""

    def __call__(self, documents: Iterator[TextPair], tokenizer: Tokenizer) -> Iterator[Encoded]:
        for pair in documents:
            texts = [add_bos_eos(ids, tokenizer) for ids in tokenizer.encode_batch([pair.source, pair.target])]
            first, second = (ids[: self.length] for ids in texts)
            note = TRUNCATED if max(map(len, texts)) > self.length else None
            yield Encoded([*first, *second] if first and second else [], label=len(first), note=note)
