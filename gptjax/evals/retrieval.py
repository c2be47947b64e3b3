"""Retrieval of texts by their embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from gptjax.data.encoding import held_out
from gptjax.data.pairs import TextPair
from gptjax.evals.intervals import mean
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluation):
    """Share of held-out pairs whose second text is the nearest to the first, by cosine, of all second texts:
    `Retrieval(source)(model) -> Result`, for any model with `embed`. Equal texts count as one."""

    architectures: ClassVar[tuple[str, ...]] = ("embedder", "decoder", "encoder")

    source: Source[TextPair]
    """Source of pairs: `data.PairsJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of pairs, the first of the split. None: all."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, TextPair)

    def __call__(self, model: Any) -> Result:
        pairs = held_out(self.source, self.split, self.documents, TextPair)
        targets = list(dict.fromkeys(pair.target for pair in pairs))
        own = np.array([targets.index(pair.target) for pair in pairs])
        cosines = model.embed([pair.source for pair in pairs]) @ model.embed(targets).T
        ranks = 1 + (cosines > cosines[np.arange(len(own)), own][:, None]).sum(-1)
        first = mean([float(rank == 1) for rank in ranks])
        values = {
            "retrieval_accuracy": first.mean,
            "reciprocal_rank": float(np.mean(1 / ranks)),
            "pairs": len(pairs),
            "texts": len(targets),
        }
        return Result("Retrieval", values, f"The right one of {len(targets):,} texts is nearest: **{first:.1%}**.")
