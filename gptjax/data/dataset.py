"""Base class of the kinds of data: documents of a source, tokenised once, packed into rows, shuffled, mixed.

A kind of data is one file with one subclass: how its documents are stored (`rows`), what its batches hold (`empty`),
how the model is prompted. `pretrain.py` is the simplest.

The batch of a step is a pure function of the data, the seed and the step. So the position in the data is one number,
the same for any number of processes, and each process makes just its own rows of the global batch.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from gptjax.data.batches import Batches, ValidationBatches
from gptjax.data.mix import Mix, order
from gptjax.data.packing import Concatenate, Packing, Plan, fill
from gptjax.data.store import Store, Tokens, expect
from gptjax.io import retry
from gptjax.protocols import ModelConfig, Source, Split, Tokenizer
from gptjax.types import Batch, UserError


class Rows(Protocol):
    """Random access to the rows of one source. Row `r` of epoch `e` has index `e * len(rows) + r`."""

    def __len__(self) -> int:
        """Rows per epoch."""
        ...

    def fill(self, batch: Any, at: np.ndarray, index: np.ndarray) -> None:
        """Write rows `index` int64 [R] into rows `at` int64 [R] of a batch that `Dataset.empty` made."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of one store: its documents, packed."""

    store: Store
    plan: Plan

    def __len__(self) -> int:
        return len(self.plan)

    def fill(self, batch: Batch, at: np.ndarray, index: np.ndarray) -> None:
        fill(batch, at, self.store, self.plan.pieces(index))


@dataclasses.dataclass(frozen=True)
class Dataset(abc.ABC):
    """Documents of a source as batches [B, T]."""

    batch_type: ClassVar[type[Batch]] = Batch
    """Class of the batches."""
    separator: ClassVar[str] = ""
    """Shown between a prompt and what the model writes after it."""
    document_type: ClassVar[type | tuple[type, ...]] = str
    """Class of the documents that a source must have."""

    source: Source | Tokens | Mix
    """Source of the documents."""
    length: int = 1024
    """T, tokens per row."""
    batch: int = 8
    """B, rows per step, over all processes."""
    packing: Packing = Concatenate()
    """How documents are laid out in rows."""
    shuffle: bool = True
    """Read the rows in a random order, another one each epoch; else in their order."""

    def __post_init__(self) -> None:
        for field in ("length", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be at least 1")

    @abc.abstractmethod
    def rows(self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> Rows:
        """The rows of one source, which is tokenised now unless it has been."""

    @abc.abstractmethod
    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids after which the model continues, or answers, `text`. Raises UserError where it does not write."""

    def texts_of(self, document: Any) -> Iterable[str]:
        """The texts in a document."""
        return (document,)

    def empty(self, size: int) -> Batch:
        """A batch of `size` rows of padding, in numpy."""
        fields = dataclasses.fields(Batch)
        dtypes = {"weights": np.float32}
        zeros = {f.name: np.zeros((size, self.length), dtypes.get(f.name, np.int32)) for f in fields}
        return Batch(**zeros)

    def check(self, model: ModelConfig) -> None:
        """Raises UserError, naming the field, where the rows do not fit the model."""
        limit = model.max_positions
        if limit is not None and self.length > limit:
            raise UserError(
                f"data.length: got {self.length}, must be at most {limit}, which is all that model.positions can tell "
                "apart"
            )

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes of the batch of a step, over all processes."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.empty(self.batch))

    def texts(self) -> Iterator[str]:
        """The training text, to build a tokenizer from."""
        documents: Iterator[Any] = retry.stream(lambda: self.source.documents("train"), self.source)
        for document in expect(self.document_type, documents, self.source):
            yield from self.texts_of(document)

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
        mix = self._mix
        rows = [self.rows(source, tokenizer, split, cache_dir) for source in mix.sources]
        ordered = order(list(map(len, rows)), mix.weights, seed if self.shuffle else None)

        def make(steps: np.ndarray) -> Batch:
            position = steps[:, None] * self.batch + shard * local + np.arange(local)
            return self._make(rows, *ordered(position.reshape(-1)), position.size)

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
        """All rows of a split once, in order, or `rows` of them at equal distances; errors as for `batches`."""
        local = self._shard_rows(shard, num_shards)
        of_sources = [self.rows(source, tokenizer, split, cache_dir) for source in self._mix.sources]

        def make(which: np.ndarray, index: np.ndarray, size: int) -> Batch:
            return self._make(of_sources, which, index, size)

        return ValidationBatches(make, list(map(len, of_sources)), self.batch, local, shard, rows)

    def _make(self, rows: list[Rows], which: np.ndarray, index: np.ndarray, size: int) -> Batch:
        """Row `index[i]` of source `which[i]` for each i, then padding: `size` rows."""
        batch = self.empty(size)
        for number, of_source in enumerate(rows):
            at = np.flatnonzero(which == number)
            if at.size:
                of_source.fill(batch, at, index[at])
        return batch

    @property
    def _mix(self) -> Mix:
        return self.source if isinstance(self.source, Mix) else Mix((self.source,), (1.0,))

    def _shard_rows(self, shard: int, num_shards: int) -> int:
        """Rows of a batch that one data shard has."""
        if self.batch % num_shards:
            raise UserError(f"batch: got {self.batch}, must be a multiple of the number of data shards, {num_shards}")
        if not 0 <= shard < num_shards:
            raise UserError(f"shard: got {shard}, must be from 0 to {num_shards - 1}")
        return self.batch // num_shards
