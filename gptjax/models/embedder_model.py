"""API of an embedder of texts:

embedder = gptjax.load("runs/similar", kind=gptjax.EmbedderModel)
embedder.embed(["A text.", "Another."])                       # float32 [2, D]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.models.model import TextEncoder
from gptjax.nn import BackboneConfig, EmbedderConfig, Pooling


@dataclasses.dataclass(frozen=True, eq=False)
class EmbedderModel(TextEncoder):
    """An embedder of texts. Raises UserError if configuration, parameters and tokenizer do not match."""

    config: EmbedderConfig

    def embed(
        self, texts: str | Sequence[str], pooling: Pooling | None = None, normalise: bool | None = None, batch: int = 32
    ) -> np.ndarray:
        """One vector per text, float32 [n, D], as in training.

        pooling    None: the configuration's
        normalise  divide vectors by their norm, so that dot products are cosines. None: as the configuration says
        batch      texts per forward pass: changes speed and memory only
        """
        pooling = self.config.pooling if pooling is None else pooling
        return super().embed(texts, pooling, self.config.normalise if normalise is None else normalise, batch)

    @property
    def _backbone(self) -> BackboneConfig:
        return self.config.backbone
