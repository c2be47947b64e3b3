"""Classification and regression data: labelled texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from gptjax.data.dataset import Dataset
from gptjax.data.encoding import Encode, Encoded, encoded
from gptjax.data.packing import LabelledSequences, NoPacking, Packing
from gptjax.data.sources import Example
from gptjax.data.store import Store
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import ModelConfig, Tokenizer
from gptjax.types import Batch, Labelled, UserError


@dataclasses.dataclass(frozen=True)
class Classify(Dataset):
    """Labelled texts, one per sequence. A source is `LabelledJsonl`."""

    batch_type: ClassVar[type[Batch]] = Labelled
    document_type: ClassVar[type | tuple[type, ...]] = Example

    packing: Packing = NoPacking()
    """Packing of documents into sequences: one per sequence, truncated to its length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing != NoPacking():
            raise UserError(f"packing: got {self.packing}, must be NoPacking(): a sequence has one label")

    def encodings(self) -> tuple[Encode, ...]:
        return (encode_examples,)

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> LabelledSequences:
        (store,) = stores
        assert store.labels is not None
        return LabelledSequences(store, self.packing.plan(store.offsets, self.length), store.labels)

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Raises UserError: a classifier does not generate text."""
        raise UserError(f"prompts: got {text!r}, must be none: a classifier does not generate text")

    def texts_of(self, document: Example) -> Iterable[str]:
        return (document.text,)

    def empty(self, size: int) -> Labelled:
        return Labelled(**vars(super().empty(size)), labels=np.full((size, 1), -1, np.int32))

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        check_classes(self, model)


def check_classes(data: Dataset, model: ModelConfig) -> None:
    """Raise UserError if a source has another number of classes than the model."""
    for source in data.mix.sources:
        classes, known = getattr(source, "classes", None), getattr(model, "classes", None)
        if classes is not None and len(classes) != known:
            raise UserError(f"data.source.classes: got {len(classes)}, must be {known}, as many as model.classes")


def encode_examples(documents: Iterator[Example], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode texts as in pretraining, with their classes."""
    for example, ids in encoded(documents, lambda example: example.text, tokenizer):
        if not isinstance(example.label, int):
            raise UserError(
                f"source: got the label {example.label}, must be the number of a class; numbers: data.Regress"
            )
        yield Encoded(add_bos_eos(ids, tokenizer), label=example.label)


@dataclasses.dataclass(frozen=True)
class Regress(Classify):
    """Texts with numbers, one per sequence. A source is `NumbersJsonl`."""

    def encodings(self) -> tuple[Encode, ...]:
        return (encode_numbers,)

    def empty(self, size: int) -> Labelled:
        return dataclasses.replace(super().empty(size), labels=np.zeros((size, 1), np.float32))

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        if model.architecture != "regressor":
            raise UserError(
                f"data: got Regress, which is for regressor models, must be for {model.architecture} models"
            )


def encode_numbers(documents: Iterator[Example], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode texts as in pretraining, with their numbers."""
    for example, ids in encoded(documents, lambda example: example.text, tokenizer):
        yield Encoded(add_bos_eos(ids, tokenizer), label=float(example.label))
