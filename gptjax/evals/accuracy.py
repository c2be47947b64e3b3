"""Accuracy of a classifier."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from gptjax.data.encoding import held_out
from gptjax.data.sources import Example
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluation):
    """Share of held-out texts whose most likely class is their label: `Accuracy(source)(classifier_model) ->
    Result`."""

    architectures: ClassVar[tuple[str, ...]] = ("classifier",)

    source: Source[Example]
    """Source of texts with labels: `data.LabelledJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of texts, the first of the split. None: all."""
    length: int = 256
    """Number of tokens read of each text, from its start: `length` of training."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, Example)

    def __call__(self, model: Any) -> Result:
        examples = held_out(self.source, self.split, self.documents, Example)
        predicted = model.classify([example.text for example in examples], length=self.length).argmax(-1)
        labels = np.array([example.label for example in examples])
        accuracy, majority = float(np.mean(predicted == labels)), float(np.bincount(labels).max() / len(labels))
        values = {"accuracy": accuracy, "majority_accuracy": majority, "documents": len(labels)}
        markdown = f"**{accuracy:.1%}** of {len(labels):,} held-out texts; the most frequent class: {majority:.1%}."
        return Result("Classification", values, markdown)
