"""Packing of documents into sequences of a fixed length: windows of one long stream, or whole documents.

A packing makes a plan from the documents' offsets. For given sequences, the plan lists the pieces of the token stream
that they contain; `fill` copies these pieces into a batch. Everything is vectorised over the sequences of a batch, and
no sequence is made before it is requested.

In every packing, a piece is all or part of one document, and a segment of its own. Its positions count from 0, its
targets are the next tokens of the same document. No target crosses into another document.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from gptjax.data.store import Store, spread_ranges
from gptjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Contents of some sequences: P pieces, sorted by sequence; each sequence is filled from the left. All fields are
    [P]."""

    row: np.ndarray
    """int64, index of the sequence."""
    start: np.ndarray
    """int64, offset of the piece in the token stream."""
    size: np.ndarray
    """int64, number of tokens, at least 1."""
    more: np.ndarray
    """bool, True if the document continues after the piece."""


class Plan(Protocol):
    """Random access to the sequences of a store. Sequence `r` of epoch `e` has index `e * len(plan) + r`."""

    def __len__(self) -> int:
        """Sequences per epoch. Each token is in exactly one of them."""
        ...

    def pieces(self, index: np.ndarray) -> Pieces:
        """Pieces in the sequences with these indices, int64 [R]."""
        ...


class Packing(Protocol):
    """A way to pack documents into sequences."""

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        """Plan sequences of `length` tokens for documents `offsets[d]:offsets[d + 1]`, int64 [D + 1], none of them
        empty."""
        ...


@dataclasses.dataclass(frozen=True)
class Concatenate:
    """Sequences are windows of the concatenated documents. Only the end of an epoch is padded.

    A document that continues in the next sequence is a new segment there, with positions from 0 and without its earlier
    context. The windows of each epoch are shifted by another fraction of a sequence, so that documents are not always
    split at the same places.
    """

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        return _Windows(offsets, length)


@dataclasses.dataclass(frozen=True)
class BestFit:
    """Sequences hold whole documents, and padding. Only documents longer than a sequence are split, into full sequences
    and a remainder. Pieces are placed in order of decreasing size, each into the sequence with the least sufficient
    space (best-fit decreasing; Ding et al. 2024, https://arxiv.org/abs/2404.10830). The plan takes 17 bytes of memory
    per piece, and about 100 while it is made."""

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        counts = -(-np.diff(offsets) // length)
        start = np.repeat(offsets[:-1], counts) + spread_ranges(np.zeros_like(counts), counts) * length
        end = np.repeat(offsets[1:], counts)
        size = np.minimum(end - start, length)
        row = _best_fit(size, length)
        order = np.argsort(row, kind="stable")
        pieces = Pieces(row[order], start[order], size[order], (start + size < end)[order])
        return _Packed(pieces, np.concatenate([[0], np.cumsum(np.bincount(row))]))


@dataclasses.dataclass(frozen=True)
class NoPacking:
    """Sequence d holds document d alone, truncated to the sequence length."""

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        start, size = offsets[:-1], np.diff(offsets)
        rows = np.arange(len(offsets))
        return _Packed(Pieces(rows[:-1], start, np.minimum(size, length), size > length), rows)


@dataclasses.dataclass(frozen=True, eq=False)
class _Windows:
    offsets: np.ndarray
    length: int

    def __len__(self) -> int:
        return -(-int(self.offsets[-1]) // self.length)

    def pieces(self, index: np.ndarray) -> Pieces:
        total = int(self.offsets[-1])
        epoch, row = np.divmod(index, len(self))
        # The stream is read as a ring. Multiples of the golden ratio are evenly spread for any number of epochs.
        shift = np.floor(epoch * 0.6180339887498949 % 1 * self.length).astype(np.int64)
        start = (shift + row * self.length) % total
        size = np.minimum(self.length, total - row * self.length)
        # A window past the end of the ring continues at its start.
        over = np.maximum(start + size - total, 0)
        wraps = np.flatnonzero(over)
        rows = np.concatenate([np.arange(len(index)), wraps])
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        start = np.concatenate([start, np.zeros_like(wraps)])[order]
        end = start + np.concatenate([size - over, over[wraps]])[order]
        # Split the windows where documents start.
        first = np.searchsorted(self.offsets, start, "right") - 1
        counts = np.searchsorted(self.offsets, end, "left") - first
        document = spread_ranges(first, counts)
        document_end = self.offsets[document + 1]
        start = np.maximum(np.repeat(start, counts), self.offsets[document])
        end = np.minimum(np.repeat(end, counts), document_end)
        return Pieces(np.repeat(rows, counts), start, end - start, end < document_end)


@dataclasses.dataclass(frozen=True, eq=False)
class _Packed:
    all: Pieces
    offsets: np.ndarray  # sequence r has the pieces offsets[r]:offsets[r + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pieces(self, index: np.ndarray) -> Pieces:
        row = index % len(self)
        counts = self.offsets[row + 1] - self.offsets[row]
        pick = spread_ranges(self.offsets[row], counts)
        rows = np.repeat(np.arange(len(index)), counts)
        return Pieces(rows, self.all.start[pick], self.all.size[pick], self.all.more[pick])


def fill(batch: Batch, rows: np.ndarray, store: Store, pieces: Pieces) -> None:
    """Write `pieces` into rows `rows` (int64 [R], indexed by `pieces.row`) of a zero-filled numpy batch."""
    length = batch.tokens.shape[1]
    stop = np.cumsum(pieces.size)
    begin = stop - pieces.size
    number = np.arange(len(begin))
    # First piece of the same sequence, [P].
    first = np.maximum.accumulate(np.where(np.diff(pieces.row, prepend=-1) > 0, number, 0))

    def spread(x):
        return np.repeat(x, pieces.size)

    position = np.arange(stop[-1]) - spread(begin)
    slot = spread(rows[pieces.row] * length + begin - begin[first]) + position
    # Each piece is read with the token after it, if the document continues.
    stored, weights = store.read(pieces.start, pieces.size + pieces.more)
    at = np.arange(stop[-1]) + spread(np.cumsum(pieces.more) - pieces.more)
    follows = np.ones(len(at), bool)
    follows[stop - 1] = pieces.more
    following = at + follows
    tokens, targets = stored[at], stored[following]

    for field, values in (
        (batch.tokens, tokens),
        (batch.targets, targets * follows),
        (batch.weights, follows if weights is None else weights[following] * follows),
        (batch.segments, spread(number - first + 1)),
        (batch.positions, position),
    ):
        field.reshape(-1)[slot] = values


def _best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Sequence of each piece, int64 [P]. Pieces of one size are placed together, into all sequences with the same space
    at once: the number of iterations depends on the number of sizes, not of pieces."""
    row = np.empty(len(sizes), np.int64)
    rows = 0
    open_rows: dict[int, list[np.ndarray]] = {}  # free space -> sequences that have it
    spaces = 0  # keys of open_rows, as bits
    order = np.argsort(-sizes, kind="stable")
    for pieces in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        size = int(sizes[pieces[0]])
        while len(pieces):
            fits = spaces >> size
            if fits:
                space = size + (fits & -fits).bit_length() - 1
                chosen = open_rows[space].pop()
                if not open_rows[space]:
                    spaces ^= 1 << space
            else:
                space = length
                chosen = np.arange(rows, rows - (-len(pieces) // (length // size)))
                rows += len(chosen)
            chosen, rest = np.split(chosen, [len(pieces)])
            row[pieces[: len(chosen)]] = chosen
            pieces = pieces[len(chosen) :]
            for left, group in ((space, rest), (space - size, chosen)):
                if len(group):
                    open_rows.setdefault(left, []).append(group)
                    spaces |= 1 << left
    return row


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """Packed documents of one store."""

    store: Store
    plan: Plan

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    @property
    def tokens(self) -> int:
        return int(self.store.offsets[-1])

    def __len__(self) -> int:
        return len(self.plan)

    def fill(self, batch: Any, at: np.ndarray, index: np.ndarray) -> None:
        fill(batch, at, self.store, self.plan.pieces(index))


@dataclasses.dataclass(frozen=True)
class LabelledSequences(PackedSequences):
    """Sequences of one document each, with its label or labels in a field of the batch: sequence d is document d."""

    labels: np.ndarray
    """[D], or [D, k] of several for each."""
    field: str = "labels"
    """Field of the batch, [B] or [B, k]."""

    def fill(self, batch: Any, at: np.ndarray, index: np.ndarray) -> None:
        super().fill(batch, at, index)
        field = np.asarray(getattr(batch, self.field))
        field[at] = self.labels[index % len(self)].reshape(len(at), *field.shape[1:])
