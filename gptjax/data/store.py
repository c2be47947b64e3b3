"""Token stores: each source is tokenised once per tokenizer and split, and memory-mapped afterwards.

    cache_dir/train-1f0c.../tokens.bin      uint16 or uint32 [N]   concatenated documents: bos? text eos?
                            offsets.bin     int64 [D + 1]          document d is tokens[offsets[d]:offsets[d + 1]]
                            weights.bin     uint8 [N]              conversations only: 1 for the assistant's tokens
                            labels.bin      int32 [D]              labelled texts only
                            header.json                            what it was made from, counts and digests

The folder is synced and renamed into place when it is complete, so that a killed process or a power cut leaves no
partial store. A store whose files do not have the digests in its header is made again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import mmap
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from gptjax.config import digest
from gptjax.data.files import file_digest
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.io import atomic, retry
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError, one_line

FORMAT = 4
"""Format version, part of the name of every store."""
WHOLE = ("offsets.bin", "labels.bin")
"""Files that are verified whole. Of a larger file of tokens or weights, `file_digest` reads blocks."""

TRUNCATED, DROPPED = "truncated to the sequence length", "dropped as too long"
UNTAUGHT = "without a target"
"""Notes on documents."""

log = logging.getLogger(__name__)
Document = TypeVar("Document")


@dataclasses.dataclass(frozen=True)
class Store:
    """Tokens of one split of one source."""

    path: Path
    """File of tokens."""
    dtype: str
    """Type of the tokens, "uint16" or "uint32"."""
    offsets: np.ndarray
    """int64 [D + 1], start of each of the D documents, and the end. No document is empty."""
    vocab: int
    """Bound of the tokens: each is below it."""
    fingerprint: str
    """SHA-256, in hex, of all that is stored."""
    start: int = 0
    """Index, in the file, of the first of these tokens."""
    weights_path: Path | None = None
    """File of weights. None: all are 1."""
    labels: np.ndarray | None = None
    """int32 [D], class of each document, if they have one."""
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of documents by their treatment."""

    # A memory map keeps the pages read through it resident. These live for one batch, so that reading takes the memory
    # of one batch for any size of corpus. Mapping a file again takes about 10 microseconds.

    def tokens(self) -> np.ndarray:
        """[N], memory-mapped."""
        return _map(self.path, self.dtype)[self.start :]

    def weights(self) -> np.ndarray | None:
        """uint8 [N], memory-mapped: weight of each token as a target. None: all are 1."""
        return None if self.weights_path is None else _map(self.weights_path, "uint8")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens instead of text: flat little-endian binary files, such as nanoGPT's train.bin and val.bin."""

    train: str
    """File of training tokens."""
    validation: float | str = 0.1
    """File of validation tokens, or the fraction of `train` that is held out, at its end: whole documents, if there is
    a separator. 0: none."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the numbers in the files."""
    separator: int | None = None
    """Token that ends each document, such as 50256 in GPT-2. None: each file is one document."""

    def __post_init__(self) -> None:
        if not isinstance(self.validation, str) and not 0 <= self.validation < 1:
            raise UserError(f"validation: got {self.validation}, must be a file, or a fraction from 0 to below 1")

    def documents(self, split: Split) -> Iterator[str]:
        """Raise UserError: there are no texts."""
        raise UserError(f"tokenizer: cannot be trained on {self}, which has tokens only; load the one that made them")

    def store(self, tokenizer: Tokenizer, split: Split) -> Store:
        """The store of a split's file, which is read in place. Raises UserError."""
        own = split == "validation" and isinstance(self.validation, str)
        name, path = (split, self.validation) if own else ("train", self.train)
        path = Path(str(path)).expanduser()
        if not path.is_file():
            raise UserError(f"{name}: got {path}, which does not exist, must be a file of {self.dtype} tokens")
        itemsize = np.dtype(self.dtype).itemsize
        if path.stat().st_size == 0 or path.stat().st_size % itemsize:
            raise UserError(f"{name}: got {path} of {path.stat().st_size} bytes, must be {self.dtype} tokens")
        count, chunk = path.stat().st_size // itemsize, 1 << 22
        ends = [np.array([0])]
        for start in range(0, count, chunk):
            part = _map(path, self.dtype)[start : start + chunk]
            if part.max() >= tokenizer.vocab:
                raise UserError(
                    f"{name}: {path} has token {part.max()}, but the tokenizer's are below {tokenizer.vocab}; "
                    f"give the tokenizer that made the file, and the right dtype (got {self.dtype})"
                )
            if self.separator is not None:
                ends.append(np.flatnonzero(part == self.separator) + start + 1)
        offsets = np.concatenate(ends)
        if offsets[-1] != count:
            offsets = np.append(offsets, count)
        start, end = self._range(split, offsets)
        offsets = np.unique(np.clip(offsets, start, end)) - start
        if len(offsets) < 2:
            raise UserError(f"validation: got {self.validation}, which leaves no document of {path} for {split}")
        fingerprint = file_digest(path, f"{self.separator}, {start}:{end}")
        return Store(path, self.dtype, offsets, tokenizer.vocab, fingerprint, start)

    def _range(self, split: Split, offsets: np.ndarray) -> tuple[int, int]:
        """First and last token of a split in its file, whose documents have these offsets."""
        count = int(offsets[-1])
        if isinstance(self.validation, str):
            return 0, count
        cut = int(count * (1 - self.validation))
        if self.separator is not None:
            cut = int(offsets[np.searchsorted(offsets, cut)])
        return (0, cut) if split == "train" else (cut, count)


class Encoded(NamedTuple):
    """A document as it is stored."""

    ids: Sequence[int]
    """Its tokens. A document without tokens is left out."""
    weights: Sequence[float] | None = None
    """0 or 1 for each token: its weight as a target. None: all 1. A source has weights for all documents or for
    none."""
    label: int | None = None
    """Its class, if it has one."""
    note: str | None = None
    """Treatment, such as "truncated": the number of documents of each is logged."""


Encode = Callable[[Iterator[Any], Tokenizer], Iterator[Encoded]]
"""Encoding of a kind of data, as a module-level function, whose name is part of the store's name, or as a frozen
dataclass, whose fields are too."""


def encoded(
    documents: Iterator[Document], text: Callable[[Document], str], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with the ids of its text, encoded in chunks."""
    for chunk in _chunks(documents, lambda document: len(text(document))):
        yield from zip(chunk, tokenizer.encode_batch(map(text, chunk)), strict=True)


def encode_texts(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode texts with weight 1 everywhere."""
    return (Encoded(add_bos_eos(ids, tokenizer)) for _, ids in encoded(documents, str, tokenizer))


def expect(kinds: type | tuple[type, ...], documents: Iterator[Any], source: object) -> Iterator[Any]:
    """Yield the documents. Raises UserError for one of another class."""
    for document in documents:
        if not isinstance(document, kinds):
            raise _unexpected(type(document), kinds, source)
        yield document


def held_out(source: Source[Document], split: Split, count: int | None, kind: type[Document]) -> list[Document]:
    """First `count` documents of a split (None: all), all of class `kind`, to evaluate on. Raises UserError for another
    class, or if there are none."""
    documents = list(itertools.islice(expect(kind, source.documents(split), source), count))
    if not documents:
        raise UserError(f"source: {source} has no text in its {split} split to evaluate on")
    return documents


def _unexpected(kind: type, kinds: type | tuple[type, ...], source: object) -> UserError:
    names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    return UserError(f"source: got {source}, whose documents are {kind.__name__}, must be {names}")


def tokenize(
    source: Source | Tokens,
    tokenizer: Tokenizer,
    split: Split,
    cache_dir: str | Path,
    encode: Encode = encode_texts,
    kinds: type | tuple[type, ...] = str,
) -> Store:
    """Tokens of `split`, stored now unless they are already. Memory does not grow with the corpus.

    encode  encoding of the documents
    kinds   classes of documents that `encode` accepts

    If several processes ask for the same store at once, one makes it and the others wait. Raises UserError if the split
    has no documents, or documents of another class.
    """
    if isinstance(source, Tokens):
        if not issubclass(str, kinds):
            raise _unexpected(str, kinds, source)
        return source.store(tokenizer, split)
    made_from = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
        "split": split,
        "encoding": f"{encode.__module__}.{getattr(encode, '__qualname__', encode)}",
    }
    folder = Path(cache_dir) / f"{split}-{digest(made_from)[:16]}"
    with atomic.usable(folder.parent, "cache", "set GPTJAX_CACHE to another folder"), contextlib.ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(atomic.lock(folder.with_suffix(".lock")))
        if (store := _open(folder, tokenizer.vocab)) is not None:
            _tell(store, source, split)
            return store
        shutil.rmtree(folder, ignore_errors=True)
        with atomic.new(folder) as partial:
            partial.mkdir()
            documents = expect(kinds, retry.stream(lambda: source.documents(split), source), source)
            what = f"{source}, {split}"
            tokens, notes = _write(encode(documents, tokenizer), what, tokenizer.vocab, partial, made_from)
            if not tokens:
                done = f" ({_listed(notes)}; a larger length holds more)" if notes else ""
                raise UserError(f"source: {source} has no documents for {split}{done}; must have at least one")
        store = _open(folder, tokenizer.vocab)
    if store is None:
        raise UserError(f"cache: the tokens just written to {folder} are not as they were written; check the disk")
    _tell(store, source, split)
    return store


def _tell(store: Store, source: object, split: Split) -> None:
    """Log the treatment of documents. Raises UserError if none has a target."""
    done = _listed(store.notes)
    total = len(store.offsets) - 1 + store.notes.get(DROPPED, 0)
    if store.notes.get(UNTAUGHT, 0) >= len(store.offsets) - 1:
        raise UserError(
            f"source: {source} has nothing to learn for {split}: of {total:,} documents, {done}; conversations need "
            "an assistant's turn, and a length that holds it with its question"
        )
    if done:
        log.warning("%s, %s: of %d documents, %s", source, split, total, done)


def _listed(notes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {note}" for note, count in notes.items())


def _open(folder: Path, vocab: int) -> Store | None:
    """The store in this folder. None: missing or damaged."""
    if not folder.exists():
        return None
    try:
        header = json.loads((folder / "header.json").read_text())
        if header.pop("sha256") != digest(header):
            raise ValueError("header.json is not as it was written")
        for name, expected in header["verified"].items():
            if file_digest(folder / name, whole=name in WHOLE) != expected:
                raise ValueError(f"{name} is not as it was written")
        return Store(
            path=folder / "tokens.bin",
            dtype=header["dtype"],
            offsets=_map(folder / "offsets.bin", "int64"),
            vocab=vocab,
            fingerprint=digest(header["files"]),
            weights_path=folder / "weights.bin" if "weights.bin" in header["files"] else None,
            labels=_map(folder / "labels.bin", "int32") if "labels.bin" in header["files"] else None,
            notes=header["notes"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: damaged (%s); tokenizing again", folder, one_line(error))
        return None


def _write(
    documents: Iterator[Encoded], what: str, vocab: int, folder: Path, made_from: dict[str, Any]
) -> tuple[int, Mapping[str, int]]:
    """Store all documents in `folder`, header last. Returns the number of tokens, and of documents by note."""
    dtype = "uint16" if vocab <= 1 << 16 else "uint32"
    count = tokens = 0
    hashes = {}
    notes: collections.Counter[str] = collections.Counter()
    told = time.monotonic()
    with contextlib.ExitStack() as stack:
        names = "tokens.bin", "offsets.bin", "weights.bin", "labels.bin"
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}

        def write(name: str, values: np.ndarray) -> None:
            data = values.tobytes()
            hashes.setdefault(name, hashlib.sha256()).update(data)
            files[name].write(data)

        write("offsets.bin", np.array([0], "int64"))
        for document in documents:
            if document.note is not None:
                notes[document.note] += 1
            if not document.ids:
                continue
            if document.weights is not None and not any(document.weights):
                notes[UNTAUGHT] += 1
            ids = np.asarray(document.ids)
            if not 0 <= ids.min() <= ids.max() < vocab:
                raise UserError(
                    f"tokenizer: got the ids {ids.min()} to {ids.max()} for document {count} of {what}, must be from 0 "
                    f"to {vocab - 1}, below its vocab"
                )
            count, tokens = count + 1, tokens + len(document.ids)
            write("tokens.bin", ids.astype(dtype))
            write("offsets.bin", np.array([tokens], "int64"))
            if document.weights is not None:
                write("weights.bin", np.asarray(document.weights, "uint8"))
            if document.label is not None:
                write("labels.bin", np.array([document.label], "int32"))
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.info("tokenizing %s: %d documents, %d tokens so far", what, count, tokens)
    for name in files.keys() - hashes.keys():
        (folder / name).unlink()
    header = {
        **made_from,
        "dtype": dtype,
        "documents": count,
        "tokens": tokens,
        "notes": notes,
        "files": {name: found.hexdigest() for name, found in hashes.items()},
        "verified": {name: file_digest(folder / name, whole=name in WHOLE) for name in hashes},
    }
    (folder / "header.json").write_text(json.dumps({"sha256": digest(header), **header}, indent=1))
    return tokens, notes


def combine(*fingerprints: str) -> str:
    """Fingerprint of several stores together."""
    return digest(fingerprints)


def _chunks(documents: Iterator[Document], size: Callable[[Document], int]) -> Iterator[list[Document]]:
    """Chunks of documents, large enough for efficient encoding, small enough for memory."""
    chunk, total = [], 0
    for document in documents:
        chunk.append(document)
        total += size(document)
        if total > 1 << 20 or len(chunk) == 1024:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _map(path: Path, dtype: str) -> np.ndarray:
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
