"""Encoding of documents: their ids, with weights as targets, labels, and notes on their treatment; in chunks, in this
process or in several others."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError

TRUNCATED, DROPPED = "truncated to the sequence length", "dropped as too long"
UNTAUGHT = "without a target"
"""Notes on documents."""

CHUNK = 1 << 20
"""Characters after which a chunk ends."""
Document = TypeVar("Document")


class Encoded(NamedTuple):
    """A document as it is stored."""

    ids: Sequence[int]
    """Its tokens. A document without tokens is left out."""
    weights: Sequence[float] | None = None
    """From 0 to 1 for each token: its weight as a target. None: all 1. A source has weights for all documents or for
    none."""
    label: int | float | tuple[float, ...] | None = None
    """Its class, its number or its numbers, if it has some. All documents of a source have labels of one kind."""
    note: str | None = None
    """Treatment, such as "truncated": the number of documents of each is logged."""


Encode = Callable[[Iterator[Any], Tokenizer], Iterator[Encoded]]
"""Encoding of a kind of data, as a module-level function, whose name is part of the store's name, or as a frozen
dataclass, whose fields are too."""


def encoded(
    documents: Iterator[Document], text: Callable[[Document], str], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with the ids of its text, encoded in chunks."""
    for chunk in chunks(documents, lambda document: len(text(document))):
        yield from zip(chunk, tokenizer.encode_batch(map(text, chunk)), strict=True)


def encode_texts(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode texts with weight 1 everywhere."""
    return (Encoded(add_bos_eos(ids, tokenizer)) for _, ids in encoded(documents, str, tokenizer))


def expect(kinds: type | tuple[type, ...], documents: Iterator[Any], source: object) -> Iterator[Any]:
    """Yield the documents. Raises UserError for one of another class."""
    for document in documents:
        if not isinstance(document, kinds):
            raise unexpected(type(document), kinds, source)
        yield document


def held_out(source: Source[Document], split: Split, count: int | None, kind: type[Document]) -> list[Document]:
    """First `count` documents of a split (None: all), all of class `kind`, to evaluate on. Raises UserError for another
    class, or if there are none."""
    documents = list(itertools.islice(expect(kind, source.documents(split), source), count))
    if not documents:
        raise UserError(f"source: {source} has no text in its {split} split to evaluate on")
    return documents


def unexpected(kind: type, kinds: type | tuple[type, ...], source: object) -> UserError:
    names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    return UserError(f"source: got {source}, whose documents are {kind.__name__}, must be {names}")


def chunks(documents: Iterator[Document], size: Callable[[Document], int]) -> Iterator[list[Document]]:
    """Chunks of documents, large enough for efficient encoding, small enough for memory."""
    chunk, total = [], 0
    for document in documents:
        chunk.append(document)
        total += size(document)
        if total > CHUNK or len(chunk) == 1024:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def characters(document: Any) -> int:
    """Number of characters of a document: of a text, or of all texts in an object or a list."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, Mapping):
        return sum(map(characters, document.values()))
    if isinstance(document, Iterable):
        return sum(map(characters, document))
    return sum(map(characters, vars(document).values())) if hasattr(document, "__dict__") else 0


class RowError(UserError):
    """An error of one document, `number` counted from 1. kind: such as "conversation"."""

    def __init__(self, number: int, reason: str, kind: str):
        super().__init__(f"source: {kind} {number}: {reason}")
        self.number, self.reason, self.kind = number, reason, kind


class Job(NamedTuple):
    """A chunk to encode, or (documents None) one whose shard is there already or another worker's."""

    part: int
    shard: int
    documents: list[Any] | None
    first: int
    """Number of the first document in the part, from 0."""
    ends: bool
    """True: the last chunk of its shard."""
    last: bool
    """True: the last chunk of its part."""


class Chunk(NamedTuple):
    """Encoded documents."""

    tokens: np.ndarray
    """uint16 or uint32 [n]."""
    sizes: np.ndarray
    """int64 [d], tokens of each document that has some."""
    weights: np.ndarray | None
    """uint8 or float32 [n]."""
    labels: np.ndarray | None
    """int32 or float32, [d] or [d, k]."""
    notes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encoding of chunks, in whatever process."""

    encode: Encode
    tokenizer: Tokenizer
    what: str

    def __call__(self, documents: list[Any], first: int) -> Chunk:
        vocab, notes, sizes = self.tokenizer.vocab, collections.Counter(), []
        ids: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        labels: list[int | float | tuple[float, ...]] = []
        try:
            for document in self.encode(iter(documents), self.tokenizer):
                self._count(document, notes)
                if document.ids:
                    ids.append(np.asarray(document.ids))
                    sizes.append(len(document.ids))
                    if document.weights is not None:
                        weights.append(np.asarray(document.weights, np.float32))
                    if document.label is not None:
                        labels.append(document.label)
        except RowError as error:
            raise UserError(str(RowError(first + error.number, error.reason, error.kind))) from None
        tokens = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise UserError(
                f"tokenizer: got the ids {tokens.min()} to {tokens.max()} for documents {first} to "
                f"{first + len(documents) - 1} of {self.what}, must be from 0 to {vocab - 1}, below its vocab"
            )
        together = np.concatenate(weights) if weights else None
        if together is not None and np.isin(together, (0, 1)).all():
            together = together.astype(np.uint8)
        return Chunk(
            tokens.astype(token_dtype(vocab)),
            np.array(sizes, np.int64),
            together,
            _labels(labels) if labels else None,
            notes,
        )

    def _count(self, document: Encoded, notes: collections.Counter[str]) -> None:
        if document.note is not None:
            notes[document.note] += 1
        if document.ids and document.weights is not None and not any(document.weights):
            notes[UNTAUGHT] += 1


def _labels(labels: Sequence[int | float | tuple[float, ...]]) -> np.ndarray:
    """Labels as an array: int32 if they are integers, else float32."""
    found = np.array(labels)
    return found.astype(np.int32 if np.issubdtype(found.dtype, np.integer) else np.float32)


def token_dtype(vocab: int) -> str:
    """Type of tokens below `vocab`."""
    return "uint16" if vocab <= 1 << 16 else "uint32"


def in_order(jobs: Iterator[Job], encoder: Encoder, processes: int) -> Generator[tuple[Job, Chunk | None], None, None]:
    """Jobs in their order, each with its encoded chunk (None: it has no documents). processes: 1 is this one."""
    if processes == 1:
        for job in jobs:
            yield job, None if job.documents is None else encoder(job.documents, job.first)
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (encoder,))
    waiting: collections.deque[tuple[Job, Future[Chunk] | None]] = collections.deque()

    def oldest() -> tuple[Job, Chunk | None]:
        job, done = waiting.popleft()
        return job, None if done is None else done.result()

    try:
        for job in jobs:
            done = None if job.documents is None else pool.submit(_run, job.documents, job.first)
            waiting.append((job._replace(documents=None), done))
            if len(waiting) > 3 * processes:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None
"""That of this process, in a pool."""


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core


def _run(documents: list[Any], first: int) -> Chunk:
    assert _encoder is not None
    return _encoder(documents, first)
