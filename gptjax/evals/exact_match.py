"""Share of texts that a sequence-to-sequence model generates exactly as the reference."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from gptjax.data.encoding import held_out
from gptjax.data.pairs import TextPair
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class ExactMatch(Evaluation):
    """Share of held-out sources whose greedy target equals the reference: `ExactMatch(source)(text_to_text)`."""

    architectures: ClassVar[tuple[str, ...]] = ("encoder-decoder",)

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

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, TextPair)

    def __call__(self, model: Any) -> Result:
        pairs = held_out(self.source, self.split, self.documents, TextPair)
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
