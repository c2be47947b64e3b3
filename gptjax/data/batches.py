"""Endless batches to train on, made ahead of time, and the list of batches of a validation split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import numpy as np

from gptjax.types import Batch


class Batches(Iterator[Batch]):
    """Endless batches, prefetched by a thread of Grain's.

    `state()` is the position as JSON: the next step, whatever the number of processes. After an exception in the middle
    of a `next`, such as Ctrl-C, the position is still the batch that was not returned.
    """

    def __init__(self, make: Callable[[np.ndarray], Batch], size: int, steps: int):
        """
        make   (steps int64 [n]) -> the batches of these steps, concatenated
        size   rows per batch
        steps  n, the steps that `make` is called for at a time: with small batches many, to save calls
        """
        self._make, self._size, self._steps = make, size, steps
        self._step = 0
        self._made: Generator[Batch] | None = None

    def __next__(self) -> Batch:
        try:
            if self._made is None:
                self._made = self._from(self._step)
            batch = next(self._made)
            self._step += 1
        except BaseException:
            self.close()
            raise
        return batch

    def _from(self, step: int) -> Generator[Batch]:
        import grain

        block, skip = divmod(step, self._steps)
        steps = np.arange(self._steps)
        blocks = grain.MapDataset.range(1).repeat().map_with_index(lambda i, _: self._make(i * self._steps + steps))
        made = iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        with contextlib.closing(made):
            made.set_state({"next_index": block})
            for block in made:
                for start in range(skip * self._size, self._steps * self._size, self._size):
                    yield jax.tree.map(lambda x: x[start : start + self._size], block)  # noqa: B023
                skip = 0

    def state(self) -> dict[str, int]:
        """The position."""
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a position that `state()` gave."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stop the thread and drop what was prefetched; `next` continues at the same position."""
        if self._made is not None:
            self._made.close()
            self._made = None


class ValidationBatches(Sequence[Batch]):
    """All rows of a split, or some at equal distances, as batches of one shape, made when they are asked for. The last
    one is padded with rows of weight and segment 0."""

    def __init__(
        self,
        make: Callable[[np.ndarray, np.ndarray, int], Batch],
        sizes: Sequence[int],
        batch: int,
        local: int,
        shard: int,
        limit: int | None = None,
    ):
        """
        make   (which source int64 [n], which of its rows int64 [n], size) -> a batch of these rows, padded to `size`
        sizes  rows of each source
        batch  rows per batch, over all data shards; `local` of them are those of the data shard `shard`
        limit  rows to take. None: all
        """
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
