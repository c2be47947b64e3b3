"""API of a classifier of tokens: names in texts, or the steps of solutions:

tagger = gptjax.load("runs/names", kind=gptjax.TokenClassifierModel)
tagger.classify([["Ada", "sleeps"]])                          # [["B-PER", "O"]]
judge = gptjax.load("runs/steps", kind=gptjax.TokenClassifierModel)
judge.step_scores("2 + 3 * 4?", ["3 * 4 = 12", "2 + 12 = 15"])        # float32 [2], probability that a step is right
judge.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.tags import step_ids, tagged_ids
from gptjax.data.tokenizers import Tokenizer
from gptjax.models.model import TextEncoder
from gptjax.nn import BackboneConfig, ModelConfig, TokenClassifierConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenClassifierModel(TextEncoder):
    """A classifier of tokens. Raises UserError if configuration, parameters and tokenizer do not match."""

    config: TokenClassifierConfig
    labels: tuple[str, ...] | None = None
    """Names of the classes, in order. None: their numbers, as text."""
    step_separator: str = "\n"
    """Text after each step of a solution, at whose last token the step's class is read."""

    def __post_init__(self):
        super().__post_init__()
        if self.labels is not None and len(self.labels) != self.config.classes:
            raise UserError(f"labels: got {len(self.labels)}, must be {self.config.classes}, as many as model.classes")

    def classify(self, texts: Sequence[Sequence[str]], batch: int = 32) -> list[list[str]]:
        """Label of each word, read at its first token. A word of which the tokenizer makes no token has the first
        label.

        texts  words of each text
        batch  texts per forward pass: changes speed and memory only
        """
        encoded = [tagged_ids(words, self.tokenizer) for words in texts]
        logits = self._outputs(self._module, [ids for ids, _ in encoded], batch)
        names = self.labels or tuple(map(str, range(self.config.classes)))
        return [
            [names[int(of_text[first].argmax())] if first >= 0 else names[0] for first in firsts]
            for of_text, (_, firsts) in zip(logits, encoded, strict=True)
        ]

    def step_scores(self, prompt: str, steps: Sequence[str]) -> np.ndarray:
        """Probability that each step of a solution is right, given those before: float32 [n]. A solution as a whole is
        as good as its worst step, or as the product of all (Lightman et al. 2023, arXiv:2305.20050)."""
        if self.config.classes != 2:
            raise UserError(f"model.classes: got {self.config.classes}, must be 2 to score steps, wrong or right")
        if not steps:
            return np.zeros(0, np.float32)
        ids, lasts = step_ids(prompt, steps, self.tokenizer, self.step_separator)
        (logits,) = self._outputs(self._module, [ids], 1)
        wrong, right = logits[lasts].T
        return 1 / (1 + np.exp(wrong - right))

    @property
    def _backbone(self) -> BackboneConfig:
        return self.config.backbone

    @property
    def _settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "step_separator": self.step_separator}

    @property
    def _hf_settings(self) -> dict[str, Any]:
        return {"labels": self.labels}

    @classmethod
    def settings_of_hf(cls, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        from gptjax.interop import huggingface

        return {"labels": huggingface.read_labels(path)}

    @classmethod
    def settings_of_run(cls, data: dict[str, Any]) -> dict[str, Any]:
        source = data.get("source")
        classes = source.get("classes") if isinstance(source, dict) else None
        found: dict[str, Any] = {"labels": tuple(map(str, classes))} if classes else {}
        return found | ({"step_separator": data["step_separator"]} if "step_separator" in data else {})
