"""Endless prefetched batches for training, and the batches of a validation split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.types import Batch


class Batches(Iterator[Batch]):
    """Endless batches, prefetched by a Grain thread.

    `state()` is the position as JSON: the next sequence of the global order, for any number of processes and any batch
    size. After an exception inside `next`, such as Ctrl-C, the position is still that of the batch that was not
    returned.
    """

    def __init__(
        self,
        make: Callable[[np.ndarray], Batch],
        size: int,
        local: int,
        steps: int,
        fingerprint: str,
        tokens: int,
        epochs: Callable[[int], list[float]],
        epoch: float,
    ):
        """Batches that `make` returns.

        make   (first sequences int64 [n] of n batches) -> these batches, concatenated
        size   B, sequences per batch, over all processes
        local  sequences per batch that `make` returns
        steps  n, batches per call of `make`: many for small batches, to save calls
        fingerprint  SHA-256, in hex, of the data
        tokens  number of tokens of all sources
        epochs  number of sequences -> epochs of each source in them
        epoch   number of sequences until every source has been read once
        """
        self.fingerprint = fingerprint
        self._make, self._size, self._local, self._steps = make, size, local, steps
        self._tokens, self._epochs = tokens, epochs
        self.epoch = epoch
        self._sequence = 0
        self._made: Generator[Batch] | None = None

    def __next__(self) -> Batch:
        try:
            if self._made is None:
                self._made = self._from(self._sequence)
            batch = next(self._made)
            self._sequence += self._size
        except BaseException:
            self.close()
            raise
        return batch

    def _from(self, sequence: int) -> Generator[Batch]:
        import grain

        def make(block: int, _: Any) -> Batch:
            return self._make(sequence + self._size * (block * self._steps + np.arange(self._steps)))

        blocks = grain.MapDataset.range(1).repeat().map_with_index(make)
        made = iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        with contextlib.closing(made):
            for block in made:
                for start in range(0, self._steps * self._local, self._local):
                    yield jax.tree.map(lambda x: x[start : start + self._local], block)  # noqa: B023

    def describe(self, sequences: int) -> str:
        """Number of epochs in so many sequences, and size of the data."""
        epochs = sorted({float(f"{count:.2g}") for count in self._epochs(sequences)})
        several = f"{epochs[0]:g} to " if len(epochs) > 1 else ""
        return f"{several}{epochs[-1]:g} epochs of {self._tokens:,} tokens"

    def state(self) -> dict[str, int]:
        """Position, as JSON."""
        return {"sequence": self._sequence}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a position that `state()` returned."""
        self.close()
        self._sequence = int(state["sequence"])

    def close(self) -> None:
        """Stop the thread and drop prefetched batches. `next` continues at the same position."""
        if self._made is not None:
            self._made.close()
            self._made = None


class ValidationBatches(Sequence[Batch]):
    """All sequences of a split, or a number of them at equal distances, as batches of one shape. Batches are made on
    access; the last one is padded with sequences of weight and segment 0."""

    def __init__(
        self,
        make: Callable[[np.ndarray, np.ndarray, int], Batch],
        sizes: Sequence[int],
        batch: int,
        local: int,
        shard: int,
        limit: int | None = None,
        fingerprint: str | None = None,
    ):
        """Batches that `make` returns.

        make   (source index int64 [n], sequence index int64 [n], size) -> batch of these sequences, padded to `size`
        sizes  sequences per source
        batch  sequences per batch, over all data shards; the data shard `shard` has `local` of them
        limit  maximum number of sequences. None: all
        fingerprint  SHA-256, in hex, of the data
        """
        self.fingerprint = fingerprint
        self._total = sum(sizes)
        self._count = self._total if limit is None else min(limit, self._total)
        self._make, self._sizes, self._batch, self._local, self._shard = make, sizes, batch, local, shard

    def __len__(self) -> int:
        return -(-self._count // self._batch)

    def __getitem__(self, step: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride] (no slices)
        if not 0 <= step < len(self):
            raise IndexError(step)
        first = step * self._batch + self._shard * self._local
        chosen = np.arange(first, max(first, min(first + self._local, self._count))) * self._total // self._count
        starts = np.cumsum([0, *self._sizes])
        source = np.searchsorted(starts, chosen, "right") - 1
        return self._make(source, chosen - starts[source], self._local)
