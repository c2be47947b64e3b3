"""A classifier behind one door; it tells of which class texts are:

judge = gptjax.load("runs/reviews", kind=gptjax.ClassifierModel)
judge.classify(["What a film!", "I left."])                   # float32 [2, C], the probability of each class
judge.embed(["A text.", "Another."])                          # float32 [2, D]
judge.save("somewhere/else")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.model import Reader
from gptjax.nn import ClassifierConfig, TransformerConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierModel(Reader):
    """A model that tells classes. Raises UserError when it, its parameters and its tokenizer don't fit together."""

    config: ClassifierConfig

    def classify(self, texts: str | Sequence[str], batch: int = 32, length: int | None = None) -> np.ndarray:
        """The probability of each class for each text, float32 [n, C].

        batch   how many texts are read at a time: it changes speed and memory only
        length  how many tokens of a text are read, its first: as many as in training; None: all
        """
        logits = self._of_texts(self._module, texts, batch, length)
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        return likely / likely.sum(-1, keepdims=True)

    @property
    def _trunk(self) -> TransformerConfig:
        return self.config.trunk

    def save_hf(self, path: str | Path, dtype: str = "float32", model_type: str | None = None) -> None:
        """Raises UserError: there is no table for classifiers."""
        raise UserError("model: got a classifier, must be without its head for transformers; `save` keeps it whole")
