"""Documents, and the two kinds of step that clean them.

A step is a frozen dataclass. A `Step` reads one document and returns it, an edited one or the reason to drop it. A
`CorpusStep` compares all documents before it drops any: duplicates. Any subclass, found by Python import, is a step.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with its metadata, which is kept."""

    text: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The other columns of its row."""
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class Edit:
    """A document after a change, with the number of changes by reason."""

    text: str
    reasons: Mapping[str, int]
    private: bool = False
    """Do not show the text before in the report."""


@dataclasses.dataclass(frozen=True)
class Drop:
    """The decision to leave a document out."""

    reason: str
    """Name of the rule, counted in the report."""


class Step(abc.ABC):
    """A step that decides on each document alone. Documents are read in any number of processes."""

    @abc.abstractmethod
    def __call__(self, text: str) -> str | Edit | Drop:
        """The text as it is kept: the same, or another; or the reason to drop the document."""

    def files(self) -> tuple[str, ...]:
        """Files whose content decides, as paths or globs."""
        return ()

    def appendix(self) -> Table | None:
        """A table for the report."""
        return None


class Found(NamedTuple):
    """A document to drop, by its number in the order of the documents."""

    document: int
    kept: int
    """The document that is kept in its place."""


class Corpus(Protocol):
    """All documents that reached a step."""

    def __len__(self) -> int: ...

    def signatures(self) -> Iterator[np.ndarray]:
        """The documents' signatures in their order, in parts [n, ...]."""
        ...

    def text(self, document: int) -> str:
        """The text of a document."""
        ...


class CorpusStep(abc.ABC):
    """A step that compares documents. Their signatures are computed in any number of processes."""

    reason: str
    """Name of the rule, counted in the report."""

    @abc.abstractmethod
    def signature(self, texts: list[str]) -> np.ndarray:
        """One row for each text, of one dtype and width."""

    @abc.abstractmethod
    def find(self, corpus: Corpus, folder: Path) -> list[Found]:
        """Documents to drop, in order. `folder` is for temporary files."""

    def files(self) -> tuple[str, ...]:
        """As `Step.files`."""
        return ()


class Table(NamedTuple):
    """A table of a report."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]
