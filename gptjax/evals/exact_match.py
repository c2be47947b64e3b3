"""Share of texts that a sequence-to-sequence model writes exactly as the reference has them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from gptjax.data.sources import TextPair
from gptjax.protocols import Source, Split
from gptjax.types import Result, UserError


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Share of held-out sources whose greedy target equals the reference: `evaluate(text_to_text) -> Result`."""

    source: Source[TextPair]
    """Source of pairs: `data.PairsJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of pairs, the first of the split. None: all."""
    max_tokens: int = 64
    """Maximum length of a target, in tokens."""
    shown: int = 5
    """Number of pairs that the report shows."""

    def __call__(self, model: Any) -> Result:
        pairs = list(itertools.islice(self.source.documents(self.split), self.documents))
        if not pairs:
            raise UserError(f"source: {self.source} has no pair in its {self.split} split to evaluate on")
        completions = model.generate([pair.source for pair in pairs], self.max_tokens, temperature=0)
        written = [completion.text for completion in completions]
        right = sum(text == pair.target for text, pair in zip(written, pairs, strict=True))
        lines = [
            f"**{right / len(pairs):.1%}** of {len(pairs):,} held-out texts are written exactly as the reference.\n",
            "| source | written | reference |",
            "|---|---|---|",
            *(f"| {p.source} | {text} | {p.target} |" for p, text in zip(pairs[: self.shown], written, strict=False)),
        ]
        return Result("Exact match", {"exact_match": right / len(pairs), "documents": len(pairs)}, "\n".join(lines))
