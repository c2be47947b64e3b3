"""Base class of data, and pretraining texts. Documents of a source are tokenised once, packed, shuffled and mixed.

A kind of data is a file with a subclass that defines its stored documents (`encodings`), their sequences (`packed`),
its batches (`empty`) and its prompt. `Pretrain` is the simplest.

The batch of a step is a pure function of data, seed and step. So the position in the data is one number, the same for
any number of processes, and each process makes only its own part of the global batch.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from gptjax.data.encoding import Encode, encode_texts, expect
from gptjax.data.mix import Mix, epochs, longest_epoch, order, poisson
from gptjax.data.packing import Concatenate, PackedSequences, Packing
from gptjax.data.shards import tokenize
from gptjax.data.store import Store, Tokens, combine
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.io import retry
from gptjax.protocols import ModelConfig, Source, Split, Tokenizer
from gptjax.types import Batch, UserError

log = logging.getLogger(__name__)


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
        places: str = "",
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
        places  where the tokens are, in words
        """
        self.fingerprint = fingerprint
        self._make, self._size, self._local, self._steps = make, size, local, steps
        self._tokens, self._epochs, self._places = tokens, epochs, places
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

        def make(block: int, _: object) -> Batch:
            return self._make(sequence + self._size * (block * self._steps + np.arange(self._steps)))

        blocks = grain.MapDataset.range(1).repeat().map_with_index(make)
        made = iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        with contextlib.closing(made):
            for block in made:
                for start in range(0, self._steps * self._local, self._local):
                    yield jax.tree.map(lambda x: x[start : start + self._local], block)  # noqa: B023

    def describe(self, sequences: int) -> str:
        """Number of epochs in so many sequences, size of the data, and where their tokens are."""
        epochs = sorted({float(f"{count:.2g}") for count in self._epochs(sequences)})
        several = f"{epochs[0]:g} to " if len(epochs) > 1 else ""
        return f"{several}{epochs[-1]:g} epochs of {self._tokens:,} tokens{self._places and f', {self._places}'}"

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
class Dataset(abc.ABC):
    """Documents of a source as batches [B, T]."""

    batch_type: ClassVar[type[Batch]] = Batch
    """Class of the batches."""
    separator: ClassVar[str] = ""
    """Shown between a prompt and the model's output."""
    can_sample: ClassVar[bool] = True
    """True: `batches` takes a `rate`."""
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
        rate: Callable[[int], float] | None = None,
    ) -> Batches:
        """Endless training batches: sequences [B / num_shards, T] of the data shard `shard`.

        rate  number of sequences -> probability of each to be in a step, for Poisson sampling. None: epochs

        Raises UserError for an empty split, or for a batch that is not a multiple of `num_shards`.
        """
        if seed < 0:
            raise UserError(f"seed: got {seed}, must not be negative")
        local = self._shard_size(shard, num_shards)
        mix = self.mix
        stores = [self.stores(source, tokenizer, split, cache_dir) for source in mix.sources]
        rows = [self.packed(of_source, tokenizer) for of_source in stores]
        sizes, phases = list(map(len, rows)), mix.phases(self.batch)
        if rate is None:
            ordered = order(sizes, phases, seed if self.shuffle else None)
            read = functools.partial(epochs, sizes, phases), longest_epoch(sizes, phases)
        elif len(sizes) > 1:
            raise UserError("source: got a mixture, must be a single source to draw sequences from")
        else:
            each = rate(sizes[0])
            ordered = poisson(sizes[0], each, self.batch, seed)
            read = lambda count: [each * count / self.batch], sizes[0]

        def make(first: np.ndarray) -> Batch:
            position = first[:, None] + shard * local + np.arange(local)
            return self._make(rows, *ordered(position.reshape(-1)), position.size)

        steps = max(1, 2**14 // (local * self.length))
        fingerprint, tokens = combine(*(row.fingerprint for row in rows)), sum(row.tokens for row in rows)
        places = " and ".join(sorted({store.place for of_source in stores for store in of_source}))
        return Batches(make, self.batch, local, steps, fingerprint, tokens, *read, places)

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


@dataclasses.dataclass(frozen=True)
class Pretrain(Dataset):
    """Plain text. Every token is a target."""

    def encodings(self) -> tuple[Encode, ...]:
        return (encode_texts,)

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of `text`, for the model to continue."""
        return add_bos_eos(tokenizer.encode(text), tokenizer, append_eos=False)
