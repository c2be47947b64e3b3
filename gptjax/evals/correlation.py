"""Correlation of a regression with the labels."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from gptjax.data.encoding import held_out
from gptjax.data.sources import Example
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class Correlation(Evaluation):
    """Pearson's and Spearman's correlation of predicted numbers with those of held-out texts, and the mean squared
    error: `Correlation(source)(regressor_model) -> Result`. A constant has a correlation of 0."""

    architectures: ClassVar[tuple[str, ...]] = ("regressor",)

    source: Source[Example]
    """Source of texts with numbers: `data.NumbersJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of texts, the first of the split. None: all."""
    length: int = 256
    """Number of tokens read of each text, from its start: `length` of training."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, Example)

    def __call__(self, model: Any) -> Result:
        from scipy.stats import rankdata

        examples = held_out(self.source, self.split, self.documents, Example)
        predicted = model.predict([example.text for example in examples], length=self.length).astype(np.float64)
        labels = np.array([example.label for example in examples], np.float64)
        pearson, spearman = _pearson(predicted, labels), _pearson(rankdata(predicted), rankdata(labels))
        squared = float(np.mean((predicted - labels) ** 2))
        values = {"pearson": pearson, "spearman": spearman, "squared_error": squared, "documents": len(labels)}
        markdown = (
            f"Pearson **{pearson:.3f}**, Spearman {spearman:.3f}, mean squared error {squared:.4g} of {len(labels):,} "
            f"held-out texts, whose variance is {float(labels.var()):.4g}."
        )
        return Result("Regression", values, markdown)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0
