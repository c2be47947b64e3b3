"""How documents become rows of a fixed length: cut from one long stream, or packed whole.

A packing makes a plan from where the documents start; the plan says, for any rows, which pieces of the token stream
stand in them; `fill` copies those pieces into a batch. All of it is vectorised over the rows of a batch, and no row is
made before it is asked for.

Whatever the packing: a piece is all or part of one document and a segment of its own, its positions count from 0, its
targets are the tokens that follow in the same document. No target crosses from one document into the next.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from gptjax.data.store import Store
from gptjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What stands in some rows: P pieces, sorted by row, each row filled from the left. All fields are [P]."""

    row: np.ndarray
    """int64, which of the rows."""
    start: np.ndarray
    """int64, where in the token stream the piece starts."""
    size: np.ndarray
    """int64, how many tokens it has, at least 1."""
    more: np.ndarray
    """bool, whether its document goes on after it."""


class Plan(Protocol):
    """Random access to the rows of a store. Row `r` of epoch `e` has index `e * len(plan) + r`."""

    def __len__(self) -> int:
        """Rows an epoch: each token stands in exactly one of them."""
        ...

    def pieces(self, index: np.ndarray) -> Pieces:
        """What stands in the rows with these indices, int64 [R]."""
        ...


class Packing(Protocol):
    """A way to lay documents out in rows."""

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        """The rows of `length` tokens for documents `offsets[d]:offsets[d + 1]`, int64 [D + 1], none of them empty."""
        ...


@dataclasses.dataclass(frozen=True)
class Concatenate:
    """Rows are windows on the concatenated documents, with no padding but at the end of an epoch.

    A document that goes on in another row is a new segment there, with positions from 0: it has lost its context. So
    that the cuts are not always at the same places, the windows of each epoch are shifted by another part of a row.
    """

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        return _Windows(offsets, length)


@dataclasses.dataclass(frozen=True)
class BestFit:
    """Rows hold whole documents, the rest is padding; only a document longer than a row is cut, into full rows and a
    rest. Largest first, each piece goes into the row with the least space that takes it (best-fit decreasing; Ding et
    al. 2024, https://arxiv.org/abs/2404.10830). The plan takes 17 bytes of memory a piece, some 100
    while it is made.
    """

    def plan(self, offsets: np.ndarray, length: int) -> Plan:
        counts = -(-np.diff(offsets) // length)
        start = np.repeat(offsets[:-1], counts) + _ranges(np.zeros_like(counts), counts) * length
        end = np.repeat(offsets[1:], counts)
        size = np.minimum(end - start, length)
        row = _best_fit(size, length)
        order = np.argsort(row, kind="stable")
        pieces = Pieces(row[order], start[order], size[order], (start + size < end)[order])
        return _Packed(pieces, np.concatenate([[0], np.cumsum(np.bincount(row))]))


@dataclasses.dataclass(frozen=True)
class Alone:
    """Row d holds document d and nothing else; what is beyond the end of the row is left out."""

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
        # The stream is read as a ring. Multiples of the golden ratio are spread evenly however many are taken.
        shift = np.floor(epoch * 0.6180339887498949 % 1 * self.length).astype(np.int64)
        start = (shift + row * self.length) % total
        size = np.minimum(self.length, total - row * self.length)
        # A window over the end of the ring goes on at its beginning.
        over = np.maximum(start + size - total, 0)
        wraps = np.flatnonzero(over)
        rows = np.concatenate([np.arange(len(index)), wraps])
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        start = np.concatenate([start, np.zeros_like(wraps)])[order]
        end = start + np.concatenate([size - over, over[wraps]])[order]
        # Cut the windows where documents start.
        first = np.searchsorted(self.offsets, start, "right") - 1
        counts = np.searchsorted(self.offsets, end, "left") - first
        document = _ranges(first, counts)
        document_end = self.offsets[document + 1]
        start = np.maximum(np.repeat(start, counts), self.offsets[document])
        end = np.minimum(np.repeat(end, counts), document_end)
        return Pieces(np.repeat(rows, counts), start, end - start, end < document_end)


@dataclasses.dataclass(frozen=True, eq=False)
class _Packed:
    all: Pieces
    offsets: np.ndarray  # row r holds the pieces offsets[r]:offsets[r + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pieces(self, index: np.ndarray) -> Pieces:
        row = index % len(self)
        counts = self.offsets[row + 1] - self.offsets[row]
        pick = _ranges(self.offsets[row], counts)
        rows = np.repeat(np.arange(len(index)), counts)
        return Pieces(rows, self.all.start[pick], self.all.size[pick], self.all.more[pick])


def fill(batch: Batch, rows: np.ndarray, store: Store, pieces: Pieces) -> None:
    """Write `pieces` into the rows `rows` (int64 [R], indexed by `pieces.row`) of a numpy batch that is all zeros."""
    length = batch.tokens.shape[1]
    stop = np.cumsum(pieces.size)
    begin = stop - pieces.size
    number = np.arange(len(begin))
    first = np.maximum.accumulate(np.where(np.diff(pieces.row, prepend=-1) > 0, number, 0))  # of the same row

    def spread(x):
        return np.repeat(x, pieces.size)

    position = np.arange(stop[-1]) - spread(begin)
    slot = spread(rows[pieces.row] * length + begin - begin[first]) + position
    at = spread(pieces.start) + position
    follows = np.ones(len(at), bool)
    follows[stop - 1] = pieces.more
    following = at + follows
    tokens, weights = store.tokens(), store.weights()

    for field, values in (
        (batch.tokens, tokens[at]),
        (batch.targets, tokens[following] * follows),
        (batch.weights, follows if weights is None else weights[following] * follows),
        (batch.segments, spread(number - first + 1)),
        (batch.positions, position),
    ):
        field.reshape(-1)[slot] = values


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers first[i], first[i] + 1, ... (counts[i] of them), for one i after the other."""
    stop = np.cumsum(counts)
    return np.arange(stop[-1]) + np.repeat(first - stop + counts, counts)


def _best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, int64 [P]. The pieces of one size are placed together, in all rows with the same space at
    once, so that the loop turns about as often as there are sizes and not as there are pieces."""
    row = np.empty(len(sizes), np.int64)
    rows = 0
    open_rows: dict[int, list[np.ndarray]] = {}  # free space -> the rows that have it
    spaces = 0  # the keys of open_rows as bits
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
