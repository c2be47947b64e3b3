"""A classifier behind one door; it tells of which class texts are:

judge = gptjax.load("runs/reviews", kind=gptjax.ClassifierModel)
judge.classify(["What a film!", "I left."])                   # float32 [2, C], the probability of each class
judge.labels                                                  # ("good", "bad"), what they are called
judge.embed(["A text.", "Another."])                          # float32 [2, D]
judge.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.models.model import TextEncoder
from gptjax.nn import BackboneConfig, ClassifierConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierModel(TextEncoder):
    """A model that tells classes. Raises UserError when it, its parameters and its tokenizer don't fit together."""

    config: ClassifierConfig
    labels: tuple[str, ...] | None = None
    """What the classes are called, in their order, if that is known."""
    append_eos: bool = True
    """Whether a text is read with the tokenizer's last token after it, as it is in training here."""

    def __post_init__(self):
        super().__post_init__()
        if self.labels is not None and len(self.labels) != self.config.classes:
            raise UserError(f"labels: got {len(self.labels)}, must be {self.config.classes}, as many as model.classes")

    def classify(self, texts: str | Sequence[str], batch: int = 32, length: int | None = None) -> np.ndarray:
        """The probability of each class for each text, float32 [n, C].

        batch   how many texts are read at a time: it changes speed and memory only
        length  how many tokens of a text are read, its first: as many as in training; None: all
        """
        logits = self._of_texts(self._module, texts, batch, length)
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        return likely / likely.sum(-1, keepdims=True)

    @property
    def _backbone(self) -> BackboneConfig:
        return self.config.backbone

    @property
    def _settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "append_eos": self.append_eos}

    def _frame(self, ids: Sequence[int]) -> list[int]:
        return add_bos_eos(ids, self.tokenizer, self.append_eos)
