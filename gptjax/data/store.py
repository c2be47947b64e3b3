"""Token stores: one split of one source, tokenised once per tokenizer, and read in ranges.

    train-1f0c.../  header.json               what it was made from, counts, its shards, digests
                    offsets.bin               int64 [D + 1]          document d is tokens[offsets[d]:offsets[d + 1]]
                    labels.bin                int32 or float32       [D] or [D, k], labelled documents only
                    00000-00000.tokens.bin    uint16 or uint32 [n]   tokens of a shard: bos? text eos?, ...
                    00000-00000.weights.bin   uint8 or float32 [n]   conversations only: weights of tokens as targets
                    00000-00000.sizes.bin     int64 [d]              tokens of each of the shard's documents
                    00000-00000.labels.bin    int32 or float32       [d] or [d, k], labelled documents only
                    00000-00000.json          counts and digests of the shard, written last

`gptjax.data.shards` makes stores. The tokens are those of the shards in the order of their names. A shard without its
.json counts for nothing, and so does a store without header.json. Files that do not have the digests in the header are
made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gptjax.config import digest
from gptjax.data.files import file_digest
from gptjax.io import atomic, retry
from gptjax.protocols import Split, Tokenizer
from gptjax.types import UserError, one_line

VERIFIED = 1 << 28
"""Bytes of shards that are verified when a store is opened: whole shards, at equal distances, the first and the last
among them. Of the others the size is, and offsets and labels are."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Tokens of a shard."""

    name: str
    """File of the tokens."""
    tokens: int
    """Number of tokens."""
    weights: str | None = None
    """File of their weights. None: all are 1."""
    weights_dtype: str = "uint8"
    """Type of the weights, "uint8" or "float32"."""
    start: int = 0
    """Index, in the file, of the first of these tokens."""


@dataclasses.dataclass(frozen=True)
class Store:
    """Tokens of one split of one source."""

    folder: Folder
    files: tuple[TokenFile, ...]
    """Files of the tokens, in order."""
    dtype: str
    """Type of the tokens, "uint16" or "uint32"."""
    offsets: np.ndarray
    """int64 [D + 1], start of each of the D documents, and the end. No document is empty."""
    vocab: int
    """Bound of the tokens: each is below it."""
    fingerprint: str
    """SHA-256, in hex, of all that is stored."""
    labels: np.ndarray | None = None
    """int32 or float32, [D] or [D, k]: class, number or numbers of each document, if they have some."""
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of documents by their treatment."""
    found: bool = True
    """False: made by the call that returned it."""

    @property
    def place(self) -> str:
        """Place of the tokens, in words."""
        return f"{'found' if self.found else 'tokenised now'} in {self.folder.address.rpartition('/')[0]}"

    def read(self, start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Concatenated tokens of ranges, `start` and `size` int64 [P], and their weights as targets (None: all are 1).
        Raises UserError for a token beyond the vocabulary."""
        starts = np.cumsum([0, *(file.tokens for file in self.files)])
        first = np.searchsorted(starts, start, "right") - 1
        counts = np.searchsorted(starts, start + size, "left") - first
        file = spread_ranges(first, counts)  # of each part of a range that lies in one file
        start, end = np.repeat(start, counts), np.repeat(start + size, counts)
        inside = np.maximum(start, starts[file]) - starts[file]
        sizes = np.minimum(end, starts[file + 1]) - np.maximum(start, starts[file])
        parts = [(self.files[f], int(s), int(n)) for f, s, n in zip(file, inside, sizes, strict=True)]
        wanted = [Range(file.name, self.dtype, file.start + s, n) for file, s, n in parts]
        if self.files[0].weights is not None:
            wanted += [Range(str(file.weights), file.weights_dtype, s, n) for file, s, n in parts]
        found = self.folder.ranges(wanted)
        tokens = np.concatenate(found[: len(parts)])
        if tokens.max(initial=0) >= self.vocab:
            largest = tokens.max()
            name = next(r.name for r, x in zip(wanted, found, strict=False) if x.max(initial=0) == largest)
            raise UserError(
                f"{self.folder.address}/{name}: damaged: got token {largest}, must be below {self.vocab}; "
                "restore it, or delete it if it is in the cache"
            )
        return tokens, np.concatenate(found[len(parts) :]) if len(wanted) > len(parts) else None

    def tokens(self) -> np.ndarray:
        """All tokens, [N]."""
        return self.read(np.array([0]), self.offsets[-1:])[0]


def spread_ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenated ranges first[i], first[i] + 1, ..., first[i] + counts[i] - 1."""
    stop = np.cumsum(counts)
    return np.arange(stop[-1]) + np.repeat(first - stop + counts, counts)


def file_facts(data: bytes) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sealed(header: Mapping[str, Any]) -> bytes:
    """A header as JSON, with its own digest."""
    return json.dumps({"sha256": digest(header), **header}, indent=1).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """The header of `sealed`. Raises ValueError if it is not as it was written."""
    header = json.loads(data)
    if header.pop("sha256") != digest(header):
        raise ValueError("its header is not as it was written")
    return header


def read_labels(folder: Folder, name: str, form: Sequence[Any]) -> np.ndarray:
    """Labels of documents. form: their dtype, and the sizes of the axes after the first."""
    dtype, *sizes = form
    return folder.array(name, dtype).reshape(-1, *sizes)


def open_store(folder: Folder, vocab: int) -> Store | None:
    """The store in this folder. None: missing, unfinished or damaged."""
    if "header.json" not in folder.names():
        return None
    try:
        header = unsealed(folder.read("header.json"))
        shards, files = header["shards"], header["files"]
        for name, facts in files.items():
            _verify(folder, name, facts, whole=True)
        chosen = _to_verify([sum(facts["size"] for facts in shard["read"].values()) for shard in shards])
        # Objects in a bucket are whole, and have checksums of their own.
        for number, shard in enumerate(shards if folder.local else []):
            for name, facts in shard["read"].items():
                _verify(folder, name, facts, whole=number in chosen)
        return Store(
            folder=folder,
            files=tuple(TokenFile(**shard["file"]) for shard in shards),
            dtype=header["dtype"],
            offsets=folder.array("offsets.bin", "int64"),
            vocab=vocab,
            fingerprint=digest([files, [shard["read"] for shard in shards]]),
            labels=read_labels(folder, "labels.bin", header["labels"]) if "labels.bin" in files else None,
            notes=header["notes"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: damaged (%s); tokenizing again", folder.address, one_line(error))
        return None


def _to_verify(sizes: list[int]) -> set[int]:
    """Numbers of the shards of these sizes that are verified whole."""
    count = max(2, len(sizes) * VERIFIED // max(sum(sizes), 1))
    return set(np.linspace(0, len(sizes) - 1, min(count, len(sizes))).round().astype(int).tolist())


def _verify(folder: Folder, name: str, facts: Mapping[str, Any], whole: bool) -> None:
    """Raise ValueError if a file is not as it was written. whole: also its content."""
    if (file_facts(folder.read(name)) != facts) if whole else (folder.size(name) != facts["size"]):
        raise ValueError(f"{name} is not as it was written")


def combine(*fingerprints: str) -> str:
    """Fingerprint of several stores together."""
    return digest(fingerprints)


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
        folder, ends = LocalFolder(path.parent), [np.array([0])]
        whole = folder.array(path.name, self.dtype)
        for start in range(0, count, chunk):
            part = whole[start : start + chunk]
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
        file = TokenFile(path.name, end - start, start=start)
        return Store(folder, (file,), self.dtype, offsets, tokenizer.vocab, fingerprint)

    def _range(self, split: Split, offsets: np.ndarray) -> tuple[int, int]:
        """First and last token of a split in its file, whose documents have these offsets."""
        count = int(offsets[-1])
        if isinstance(self.validation, str):
            return 0, count
        cut = int(count * (1 - self.validation))
        if self.separator is not None:
            cut = int(offsets[np.searchsorted(offsets, cut)])
        return (0, cut) if split == "train" else (cut, count)


class Range(NamedTuple):
    """Items of a file."""

    name: str
    dtype: str
    start: int
    """First item."""
    size: int
    """Number of items."""


class Folder(Protocol):
    """Named files. A file is written whole or not at all."""

    address: str
    """Path or URL."""
    local: bool
    """True: on a disk."""

    def names(self) -> set[str]:
        """Names of the files. Empty: there is no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a file. Raises OSError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in place of one of that name."""
        ...

    def size(self, name: str) -> int:
        """Size of a file in bytes. Raises OSError."""
        ...

    def array(self, name: str, dtype: str) -> np.ndarray:
        """A file as an array [N]."""
        ...

    def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
        """The items of each range."""
        ...


class LocalFolder:
    """A folder on a disk."""

    local = True

    def __init__(self, path: Path):
        self.path, self.address = path, str(path)

    def names(self) -> set[str]:
        return {file.name for file in self.path.iterdir()} if self.path.is_dir() else set()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with atomic.new(self.path / name, shared=True) as partial:
            partial.write_bytes(data)

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def array(self, name: str, dtype: str) -> np.ndarray:
        with open(self.path / name, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)

    # A memory map keeps the pages read through it resident. These live for one call, so that reading takes the memory
    # of one batch for any size of corpus. Mapping a file again takes about 10 microseconds.

    def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
        maps = {(r.name, r.dtype): self.array(r.name, r.dtype) for r in wanted}
        return [maps[name, dtype][start : start + size] for name, dtype, start, size in wanted]


class BucketFolder:
    """A folder in a bucket, by its URL (gs://, s3://, ...), read and written by fsspec."""

    local = False

    def __init__(self, url: str):
        self.address = url
        try:
            from fsspec.core import url_to_fs

            self._files, self._path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"tokens: got {url}, which cannot be read ({one_line(error)}); for gs:// pip install 'gptjax[gcs]'"
            ) from None

    def names(self) -> set[str]:
        try:
            found = retry.call(lambda: self._files.ls(self._path, detail=False, refresh=True), self.address)
        except FileNotFoundError:
            return set()
        return {str(name).rpartition("/")[2] for name in found}

    def read(self, name: str) -> bytes:
        return retry.call(lambda: self._files.cat_file(f"{self._path}/{name}"), f"{self.address}/{name}")

    def write(self, name: str, data: bytes) -> None:
        retry.call(lambda: self._files.pipe_file(f"{self._path}/{name}", data), f"{self.address}/{name}")

    def size(self, name: str) -> int:
        return retry.call(lambda: self._files.size(f"{self._path}/{name}"), f"{self.address}/{name}")

    def array(self, name: str, dtype: str) -> np.ndarray:
        return np.frombuffer(self.read(name), dtype)

    def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
        sizes = [np.dtype(r.dtype).itemsize for r in wanted]
        paths = [f"{self._path}/{r.name}" for r in wanted]
        starts = [r.start * size for r, size in zip(wanted, sizes, strict=True)]
        ends = [start + r.size * size for r, start, size in zip(wanted, starts, sizes, strict=True)]
        found = retry.call(lambda: self._files.cat_ranges(paths, starts, ends, on_error="raise"), self.address)
        return [np.frombuffer(data, r.dtype) for data, r in zip(found, wanted, strict=True)]


def folder_at(path: str | Path, name: str) -> Folder:
    """The folder `name` in a folder, or in a bucket's. Raises UserError if a bucket cannot be read."""
    return BucketFolder(f"{str(path).rstrip('/')}/{name}") if "://" in str(path) else LocalFolder(Path(path) / name)
