"""Base class of data: documents of a source are tokenised once, packed into sequences, shuffled and mixed.

A kind of data is a file with a subclass that defines its stored documents (`encodings`), their sequences (`packed`),
its batches (`empty`) and its prompt. `pretrain.py` is the simplest.

The batch of a step is a pure function of data, seed and step. So the position in the data is one number, the same for
any number of processes, and each process makes only its own part of the global batch.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from gptjax.data.batches import Batches, ValidationBatches
from gptjax.data.mix import Mix, epochs, longest_epoch, order
from gptjax.data.packing import Concatenate, Packing, Plan, fill
from gptjax.data.store import Encode, Store, Tokens, combine, expect, tokenize
from gptjax.io import retry
from gptjax.protocols import ModelConfig, Source, Split, Tokenizer
from gptjax.types import Batch, UserError

log = logging.getLogger(__name__)


class Sequences(Protocol):
    """Random access to the sequences of one source. Sequence `r` of epoch `e` has index `e * len(sequences) + r`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, that changes with the stored documents."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of the stored documents."""
        ...

    def __len__(self) -> int:
        """Sequences per epoch."""
        ...

    def fill(self, batch: Any, at: np.ndarray, index: np.ndarray) -> None:
        """Write sequences `index` int64 [R] into rows `at` int64 [R] of a batch that `Dataset.empty` made."""
        ...


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

    def fill(self, batch: Batch, at: np.ndarray, index: np.ndarray) -> None:
        fill(batch, at, self.store, self.plan.pieces(index))


@dataclasses.dataclass(frozen=True)
class Dataset(abc.ABC):
    """Documents of a source as batches [B, T]."""

    batch_type: ClassVar[type[Batch]] = Batch
    """Class of the batches."""
    separator: ClassVar[str] = ""
    """Shown between a prompt and the model's output."""
    document_type: ClassVar[type | tuple[type, ...]] = str
    """Class of the source's documents."""

    source: Source | Tokens | Mix
    """Source of the documents."""
    length: int = 1024
    """T, tokens per sequence."""
    batch: int = 8
    """B, sequences per step, over all processes."""
    packing: Packing = Concatenate()
    """Packing of documents into sequences."""
    shuffle: bool = True
    """Random order of the sequences, different in each epoch. False: their own order."""

    def __post_init__(self) -> None:
        for field in ("length", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be at least 1")

    @abc.abstractmethod
    def encodings(self) -> tuple[Encode, ...]:
        """Encodings of a document: each is stored on its own."""

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> Sequences:
        """Sequences of one source, whose documents are stored in each of `encodings`."""
        (store,) = stores
        return PackedSequences(store, self.packing.plan(store.offsets, self.length))

    def stores(self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> list[Store]:
        """Tokens of one source in each of `encodings`, made now unless stored."""
        encodings = self.encodings()
        return [tokenize(source, tokenizer, split, cache_dir, encode, self.document_type) for encode in encodings]

    def sequences(
        self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path
    ) -> Sequences:
        """Sequences of one source, tokenised now unless stored."""
        return self.packed(self.stores(source, tokenizer, split, cache_dir), tokenizer)

    @abc.abstractmethod
    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a prompt with `text`. Raises UserError if the model does not generate text."""

    def texts_of(self, document: Any) -> Iterable[str]:
        """Texts in a document."""
        return (document,)

    def empty(self, size: int) -> Batch:
        """A numpy batch of `size` sequences of padding."""
        fields = dataclasses.fields(Batch)
        dtypes = {"weights": np.float32}
        zeros = {f.name: np.zeros((size, self.length), dtypes.get(f.name, np.int32)) for f in fields}
        return Batch(**zeros)

    def check(self, model: ModelConfig) -> None:
        """Raise UserError, naming the field, if the sequences do not fit the model."""
        limit = model.max_positions
        if limit is not None and self.length > limit:
            raise UserError(f"data.length: got {self.length}, must be at most {limit}, the maximum of model.positions")

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes of the batch of a step, over all processes."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.empty(self.batch))

    def texts(self) -> Iterator[str]:
        """Training text, for a tokenizer to be trained on."""
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
        """Endless training batches: sequences [B / num_shards, T] of the data shard `shard`.

        Raises UserError for an empty split, or for a batch that is not a multiple of `num_shards`.
        """
        if seed < 0:
            raise UserError(f"seed: got {seed}, must not be negative")
        local = self._shard_size(shard, num_shards)
        mix = self.mix
        rows = [self.sequences(source, tokenizer, split, cache_dir) for source in mix.sources]
        sizes, phases = list(map(len, rows)), mix.phases(self.batch)
        ordered = order(sizes, phases, seed if self.shuffle else None)

        def make(first: np.ndarray) -> Batch:
            position = first[:, None] + shard * local + np.arange(local)
            return self._make(rows, *ordered(position.reshape(-1)), position.size)

        steps = max(1, 2**14 // (local * self.length))
        read = functools.partial(epochs, sizes, phases), longest_epoch(sizes, phases)
        fingerprint, tokens = combine(*(row.fingerprint for row in rows)), sum(row.tokens for row in rows)
        return Batches(make, self.batch, local, steps, fingerprint, tokens, *read)

    def evaluation(
        self,
        tokenizer: Tokenizer,
        split: Split,
        cache_dir: str | Path,
        shard: int = 0,
        num_shards: int = 1,
        sequences: int | None = None,
    ) -> ValidationBatches | None:
        """All sequences of a split once, in order, or `sequences` of them at equal distances; of a mixture, those of
        the sources that have a validation split. None: no source has one. Raises as `batches`."""
        local = self._shard_size(shard, num_shards)
        sources = self.mix.sources
        if split == "validation":
            sources = [source for source in sources if getattr(source, "validation", None) != 0]
            if sources and len(sources) < len(self.mix.sources):
                without = [str(source) for source in self.mix.sources if source not in sources]
                log.warning("no validation split, and no part in the validation loss: %s", ", ".join(without))
        if not sources:
            return None
        of_sources = [self.sequences(source, tokenizer, split, cache_dir) for source in sources]

        def make(which: np.ndarray, index: np.ndarray, size: int) -> Batch:
            return self._make(of_sources, which, index, size)

        fingerprint = combine(*(row.fingerprint for row in of_sources))
        return ValidationBatches(make, list(map(len, of_sources)), self.batch, local, shard, sequences, fingerprint)

    def _make(self, rows: list[Sequences], which: np.ndarray, index: np.ndarray, size: int) -> Batch:
        """Sequence `index[i]` of source `which[i]` for each i, then padding, `size` in all."""
        batch = self.empty(size)
        for number, of_source in enumerate(rows):
            at = np.flatnonzero(which == number)
            if at.size:
                of_source.fill(batch, at, index[at])
        return batch

    @property
    def mix(self) -> Mix:
        """The source, as a mixture."""
        return self.source if isinstance(self.source, Mix) else Mix((self.source,), (1.0,))

    def _shard_size(self, shard: int, num_shards: int) -> int:
        """Sequences of a batch per data shard."""
        if self.batch % num_shards:
            raise UserError(f"batch: got {self.batch}, must be a multiple of the number of data shards, {num_shards}")
        if not 0 <= shard < num_shards:
            raise UserError(f"shard: got {shard}, must be from 0 to {num_shards - 1}")
        return self.batch // num_shards
