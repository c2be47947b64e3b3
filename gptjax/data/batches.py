"""Endless prefetched batches for training, and the batches of a validation split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import numpy as np

from gptjax.types import Batch


class Batches(Iterator[Batch]):
    """Endless batches, prefetched by a Grain thread.

    `state()` is the position as JSON: the next step, for any number of processes. After an exception inside `next`,
    such as Ctrl-C, the position is still that of the batch that was not returned.
    """

    def __init__(self, make: Callable[[np.ndarray], Batch], size: int, steps: int):
        """Batches that `make` returns.

        make   (steps int64 [n]) -> the batches of these steps, concatenated
        size   sequences per batch
        steps  n, steps per call of `make`: many for small batches, to save calls
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
        """Position, as JSON."""
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        """Go to a position that `state()` returned."""
        self.close()
        self._step = int(state["step"])

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
    ):
        """Batches that `make` returns.

        make   (source index int64 [n], sequence index int64 [n], size) -> batch of these sequences, padded to `size`
        sizes  sequences per source
        batch  sequences per batch, over all data shards; the data shard `shard` has `local` of them
        limit  maximum number of sequences. None: all
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
