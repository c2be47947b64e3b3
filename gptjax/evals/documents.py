"""Held-out documents to evaluate on."""

from __future__ import annotations

import itertools
from typing import TypeVar

from gptjax.data.store import expect
from gptjax.protocols import Source, Split
from gptjax.types import UserError

Document = TypeVar("Document")


def held_out(source: Source[Document], split: Split, count: int | None, kind: type[Document]) -> list[Document]:
    """First `count` documents of a split (None: all), all of class `kind`. Raises UserError for another class, or if
    there are none."""
    documents = list(itertools.islice(expect(kind, source.documents(split), source), count))
    if not documents:
        raise UserError(f"source: {source} has no text in its {split} split to evaluate on")
    return documents
