"""From sources to batches: tokenise once, pack, shuffle, mix, prefetch, resume.

The batch of a step is a pure function of the data, the seed and the step. So the position in the data is one number,
the same for any number of processes, and each process makes just its own rows of the global batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.data import chat
from gptjax.data.packing import Alone, BestFit, Concatenate, Packing, Plan, fill
from gptjax.data.sources import Example
from gptjax.data.store import Store, Tokens, tokenize
from gptjax.data.tokenizers.tokenizer import frame
from gptjax.io import retry
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import Batch, Labelled, UserError


@dataclasses.dataclass(frozen=True)
class Mix:
    """Several sources as one. The rows alternate in a fixed pattern that keeps to the weights as closely as whole rows
    can, at any point; each source starts again, in another order, when it is used up."""

    sources: tuple[Source | Tokens, ...]
    """What to mix."""
    weights: tuple[float, ...]
    """Share of the rows from each source, in proportion: (3, 1) is three rows to one."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources: got none, must be at least one")
        if len(self.weights) != len(self.sources) or min(self.weights) <= 0:
            raise UserError(f"weights: got {self.weights}, must be a positive number for each of {len(self.sources)}")

    def documents(self, split: Split) -> Iterator:
        """The documents of one source after the other, whatever the weights: what a tokenizer is trained on."""
        return itertools.chain.from_iterable(source.documents(split) for source in self.sources)


@dataclasses.dataclass(frozen=True)
class _Data:
    source: Source | Tokens | Mix
    """Where the documents come from."""
    length: int = 1024
    """Tokens a row, T."""
    batch: int = 8
    """Rows a step over all processes, B."""
    packing: Packing = Concatenate()
    """How documents become rows."""
    shuffle: bool = True
    """Take the rows in a random order, another one each epoch; if not, as they come."""

    def __post_init__(self) -> None:
        for field in ("length", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be at least 1")

    def batches(
        self,
        tokenizer: Tokenizer,
        split: Split,
        seed: int,
        cache_dir: str | Path,
        shard: int = 0,
        num_shards: int = 1,
    ) -> Batches:
        """Endless batches to train on: of each, rows [B / num_shards, T], the data shard `shard` of `num_shards`.

        Raises UserError for an empty split, and for a batch that is not a multiple of `num_shards`.
        """
        if seed < 0:
            raise UserError(f"seed: got {seed}, must not be negative")
        local = self._shard_rows(shard, num_shards)
        rows = self._rows(tokenizer, split, cache_dir)
        weights = self.source.weights if isinstance(self.source, Mix) else (1.0,)
        order = _order([len(plan) for plan in rows.plans], weights, seed if self.shuffle else None)

        def make(steps: np.ndarray) -> Batch:
            place = steps[:, None] * self.batch + shard * local + np.arange(local)
            return rows.batch(*order(place.reshape(-1)), place.size)

        return Batches(make, local, steps=max(1, 2**14 // (local * self.length)))

    def evaluation(
        self,
        tokenizer: Tokenizer,
        split: Split,
        cache_dir: str | Path,
        shard: int = 0,
        num_shards: int = 1,
        rows: int | None = None,
    ) -> ValidationBatches:
        """Every row of a split once, in order, or `rows` of them at equal distances; errors as for `batches`."""
        local = self._shard_rows(shard, num_shards)
        return ValidationBatches(self._rows(tokenizer, split, cache_dir), self.batch, local, shard, rows)

    def texts(self) -> Iterator[str]:
        """The training text, to build a tokenizer from: a conversation's messages one by one."""
        source: Any = self.source
        for document in retry.stream(lambda: source.documents("train"), source):
            if isinstance(document, str | Example):
                yield document if isinstance(document, str) else document.text
            else:
                yield from (message.content for message in document)

    def _rows(self, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> _Rows:
        sources = self.source.sources if isinstance(self.source, Mix) else (self.source,)
        stores = [tokenize(source, tokenizer, split, cache_dir) for source in sources]
        return _Rows(stores, [self.packing.plan(store.offsets, self.length) for store in stores], self.length)

    def _shard_rows(self, shard: int, num_shards: int) -> int:
        """Rows of a batch that one data shard has."""
        if self.batch % num_shards:
            raise UserError(f"batch: got {self.batch}, must be a multiple of the number of data shards, {num_shards}")
        if not 0 <= shard < num_shards:
            raise UserError(f"shard: got {shard}, must be from 0 to {num_shards - 1}")
        return self.batch // num_shards


@dataclasses.dataclass(frozen=True)
class Pretrain(_Data):
    """Texts to learn to write, all of every text."""

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids after which the model goes on with `text`."""
        return frame(tokenizer.encode(text), tokenizer, append_eos=False)


@dataclasses.dataclass(frozen=True)
class Chat(_Data):
    """Conversations to learn to answer in: what the assistant says has weight 1, all else is context."""

    packing: Packing = BestFit()
    """How conversations become rows."""

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids after which the model answers `text`."""
        return chat.prompt((chat.Message("user", text),), tokenizer)


@dataclasses.dataclass(frozen=True)
class Classify(_Data):
    """Texts with labels, to learn to tell their class: a text a row. `LabelledJsonl` has such."""

    packing: Packing = Alone()
    """How documents become rows: each has its own, and what is beyond its end is not read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.packing, Alone):
            raise UserError(f"packing: got {self.packing}, must be Alone(): a row has one label")

    def _rows(self, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> _Rows:
        rows = super()._rows(tokenizer, split, cache_dir)
        if any(store.labels is None for store in rows.stores):
            raise UserError(f"source: got {self.source}, must have labels, as LabelledJsonl")
        return _LabelledRows(rows.stores, rows.plans, rows.length)

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Raises UserError: a classifier does not write."""
        raise UserError(f"prompts: got {text!r}, must be none: a classifier does not write")


class Batches(Iterator[Batch]):
    """The batches of a run, made ahead of time on a thread of Grain's.

    `state()` is the position as JSON: the next step, whatever the number of processes. After an exception in the middle
    of a `next`, Ctrl-C say, the position is still the batch that was not returned.
    """

    def __init__(self, make: Callable[[np.ndarray], Batch], size: int, steps: int):
        """`make` gives the batches of some steps, `size` rows each, one below the other. It is called for `steps` steps
        at a time: of small batches so many that numpy's work is more than the calls."""
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
        """Stop the thread. The batches that were made ahead are dropped; `next` goes on at the same position."""
        if self._made is not None:
            self._made.close()
            self._made = None


class ValidationBatches:
    """A list of batches of one shape, made when asked for; the last is filled up with rows of weight and segment 0."""

    def __init__(self, rows: _Rows, batch: int, local: int, shard: int, limit: int | None = None):
        total = sum(map(len, rows.plans))
        self._count = total if limit is None else min(limit, total)
        self._rows, self._total, self._batch, self._local, self._shard = rows, total, batch, local, shard

    def __len__(self) -> int:
        return -(-self._count // self._batch)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        first = step * self._batch + self._shard * self._local
        chosen = np.arange(first, max(first, min(first + self._local, self._count))) * self._total // self._count
        starts = np.cumsum([0, *map(len, self._rows.plans)])
        source = np.searchsorted(starts, chosen, "right") - 1
        return self._rows.batch(source, chosen - starts[source], self._local)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    @property
    def bytes_per_target(self) -> float | None:
        """UTF-8 bytes of text for each target of weight 1, over the whole split; None where only tokens are known.

        A loss of `nats` a target is `nats / log(2) / bytes_per_target` bits a byte: exact when every row is there.
        """
        stores = self._rows.stores
        text_bytes = [store.text_bytes for store in stores if store.text_bytes is not None]
        return sum(text_bytes) / sum(store.targets for store in stores) if len(text_bytes) == len(stores) else None


@dataclasses.dataclass(frozen=True)
class _Rows:
    stores: list[Store]
    plans: list[Plan]
    length: int

    def batch(self, source: np.ndarray, index: np.ndarray, size: int) -> Batch:
        """Row `index[i]` of source `source[i]` for each i, then empty rows: [size, length]."""
        shape = (size, self.length)
        batch = Batch(*(np.zeros(shape, np.float32 if i == 2 else np.int32) for i in range(5)))
        for number, (store, plan) in enumerate(zip(self.stores, self.plans, strict=True)):
            rows = np.flatnonzero(source == number)
            if rows.size:
                fill(batch, rows, store, plan.pieces(index[rows]))
        return batch


class _LabelledRows(_Rows):
    def batch(self, source: np.ndarray, index: np.ndarray, size: int) -> Labelled:
        """Row d of a source is its document d."""
        labels = np.full((size, 1), -1, np.int32)
        for number, store in enumerate(self.stores):
            rows = np.flatnonzero(source == number)
            assert store.labels is not None
            labels[rows, 0] = store.labels[index[rows] % len(store.labels)]
        return Labelled(**vars(super().batch(source, index, size)), labels=labels)


def _order(
    lengths: list[int], weights: tuple[float, ...], seed: int | None
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The function from places in the global order, int64 [R], to (which source, which of its rows), int64 [R] each.

    The places of a source count its epochs: row `r` of epoch `e` is `e * length + r`. No seed is no shuffle.
    """

    def rows(which: int, place: np.ndarray) -> np.ndarray:
        epoch, row = np.divmod(place, lengths[which])
        if seed is not None:
            for e in np.unique(epoch):
                row[epoch == e] = permute(row[epoch == e], lengths[which], (seed, which, int(e)))
        return epoch * lengths[which] + row

    if len(lengths) == 1:
        return lambda place: (np.zeros_like(place), rows(0, place))

    import grain

    endless = grain.MapDataset.range(1).repeat()
    mixed = grain.MapDataset.mix(
        [endless.map_with_index(lambda place, _, which=which: (which, place)) for which in range(len(lengths))],
        weights,
    )

    def order(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which, row = np.array([mixed[int(p)] for p in place]).reshape(-1, 2).T
        for number in range(len(lengths)):
            row[which == number] = rows(number, row[which == number])
        return which, row

    return order


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a random permutation of range(size), chosen by `key`, takes each index, int64 [R].

    No table is made: it is a Feistel network on pairs of digits, walked until it is back below `size` (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). Grain's `index_shuffle` does the same one index a call, on
    a domain of at least 2**16, which takes 0.4 ms an index where there are 100 rows.
    """
    base = int(np.ceil(np.sqrt(size)))
    index = index.copy()
    walking = np.ones(len(index), bool)
    while walking.any():
        left, right = np.divmod(index[walking], base)
        for round_key in _round_keys(key):
            left, right = right, (left + _hash(right, round_key) % base) % base
        index[walking] = left * base + right
        walking = index >= size
    return index


@functools.lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(6, np.uint64)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 on x + key, as non-negative int64."""
    x = x.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(33)).astype(np.int64)
