"""F1 of the names that a classifier of tokens finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from gptjax.data.encoding import held_out
from gptjax.data.tags import Tagged
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result, UserError


@dataclasses.dataclass(frozen=True)
class Entities(Evaluation):
    """Precision, recall and F1 of entities, over all held-out texts together, as CoNLL's script and seqeval's default
    count them: one is right if its words and its kind are. `Entities(source)(token_classifier_model) -> Result`."""

    architectures: ClassVar[tuple[str, ...]] = ("token-classifier",)

    source: Source[Tagged]
    """Source of words with labels such as B-PER and O: `data.TaggedJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of texts, the first of the split. None: all."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, Tagged)

    def __call__(self, model: Any) -> Result:
        texts = held_out(self.source, self.split, self.documents, Tagged)
        if model.labels is None:
            raise UserError("labels: got none, must be the model's, to know where entities begin")
        predicted = model.classify([text.words for text in texts])
        right = [[model.labels[label] for label in text.labels] for text in texts]
        found, there = (
            {(i, *entity) for i, tags in enumerate(each) for entity in entities(tags)} for each in (predicted, right)
        )
        common = len(found & there)
        precision, recall = (common / len(each) if each else 0.0 for each in (found, there))
        f1 = 2 * common / (len(found) + len(there)) if common else 0.0
        words = [
            a == b for tags, labels in zip(predicted, right, strict=True) for a, b in zip(tags, labels, strict=True)
        ]
        values = {
            "f1": f1,
            "precision": precision,
            "recall": recall,
            "accuracy": sum(words) / len(words),
            "entities": len(there),
        }
        markdown = f"F1 **{f1:.1%}** of {len(there):,} entities (precision {precision:.1%}, recall {recall:.1%})."
        return Result("Entities", values, markdown)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, word after the last) of the entities in IOB1, IOB2 or IOBES tags. One begins at B- and S-, at
    I- and E- after O, E- or S-, and where the kind changes; it goes on through I- and E- of its kind."""
    found: list[tuple[str, int, int]] = []
    before, kind = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        now, _, now_kind = tag.partition("-")
        if now != "O":
            begins = now in "BS" or before in "OES" or now_kind != kind
            found = [*found, (now_kind, i, i + 1)] if begins else [*found[:-1], (kind, found[-1][1], i + 1)]
        before, kind = now, now_kind
    return found
