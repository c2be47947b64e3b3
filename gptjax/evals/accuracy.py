"""How many texts a classifier puts into the right class."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from gptjax.types import Result, UserError


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """An evaluation: `evaluate(classifier_model) -> Result`."""

    source: Any
    """Where texts with labels come from: `data.LabelledJsonl`."""
    split: str = "validation"
    """Which part of it."""
    documents: int | None = None
    """How many texts; none: all."""
    length: int = 256
    """How many tokens of a text are read, its first: as many as in training."""

    def __call__(self, model: Any) -> Result:
        examples = list(itertools.islice(self.source.documents(self.split), self.documents))
        if not examples:
            raise UserError(f"source: {self.source} has no text in its {self.split} split to evaluate on")
        found = model.classify([example.text for example in examples], length=self.length).argmax(-1)
        labels = np.array([example.label for example in examples])
        right, usual = float(np.mean(found == labels)), float(np.bincount(labels).max() / len(labels))
        values = {"accuracy": right, "accuracy_of_the_usual_class": usual, "documents": len(labels)}
        markdown = f"**{right:.1%}** of {len(labels):,} held-out texts; the most frequent class alone has {usual:.1%}."
        return Result("Classes", values, markdown)
