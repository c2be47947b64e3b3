"""API of a text classifier:

judge = gptjax.load("runs/reviews", kind=gptjax.ClassifierModel)
judge.classify(["What a film!", "I left."])                   # float32 [2, C], probability of each class
judge.labels                                                  # ("good", "bad"), names of the classes
judge.embed(["A text.", "Another."])                          # float32 [2, D]
judge.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.models.model import TextEncoder
from gptjax.nn import BackboneConfig, ClassifierConfig, ModelConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierModel(TextEncoder):
    """A text classifier. Raises UserError if configuration, parameters and tokenizer do not match."""

    config: ClassifierConfig
    labels: tuple[str, ...] | None = None
    """Names of the classes, in order. None: unknown."""
    append_eos: bool = True
    """Append the tokenizer's `eos` to a text, as training here does."""

    def __post_init__(self):
        super().__post_init__()
        if self.labels is not None and len(self.labels) != self.config.classes:
            raise UserError(f"labels: got {len(self.labels)}, must be {self.config.classes}, as many as model.classes")

    def classify(self, texts: str | Sequence[str], batch: int = 32, length: int | None = None) -> np.ndarray:
        """Probability of each class for each text, float32 [n, C].

        batch   texts per forward pass: changes speed and memory only
        length  number of tokens read of each text, from its start: `length` of training. None: all
        """
        logits = self._forward_texts(self._module, texts, batch, length)
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        return likely / likely.sum(-1, keepdims=True)

    @property
    def _backbone(self) -> BackboneConfig:
        return self.config.backbone

    @property
    def _settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "append_eos": self.append_eos}

    @classmethod
    def settings_of_hf(cls, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        from gptjax.interop import huggingface

        return {"labels": huggingface.read_labels(path), "append_eos": huggingface.read_append_eos(path, tokenizer)}

    @classmethod
    def settings_of_run(cls, data: dict[str, Any]) -> dict[str, Any]:
        source = data.get("source")
        classes = source.get("classes") if isinstance(source, dict) else None
        return {"labels": tuple(map(str, classes))} if classes else {}

    def _add_bos_eos(self, ids: Sequence[int]) -> list[int]:
        return add_bos_eos(ids, self.tokenizer, self.append_eos)
