"""Tokens on disk: each source is tokenised once for each tokenizer and split, and read through a memory map after that.

    cache_dir/train-1f0c.../tokens.bin      uint16 or uint32 [N]   every document after the other: bos? text end?
                            offsets.bin     int64 [D + 1]          document d is tokens[offsets[d]:offsets[d + 1]]
                            weights.bin     uint8 [N]              only for conversations: 1 on what the assistant says
                            labels.bin      int32 [D]              only for texts with labels
                            header.json                            what it was made from, and the counts

The folder takes its name when it is complete, so that a kill leaves none half-made; one whose files are not as long as
its header says is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import mmap
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from gptjax.data.tokenizers.tokenizer import frame
from gptjax.io import atomic, retry
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError

FORMAT = 2
"""Part of the name of every store: raise it when what is stored changes."""

log = logging.getLogger(__name__)
Document = TypeVar("Document")


@dataclasses.dataclass(frozen=True)
class Store:
    """The tokens of one split of one source."""

    path: Path
    """The file of tokens."""
    dtype: str
    """Their type, "uint16" or "uint32"."""
    offsets: np.ndarray
    """int64 [D + 1], where each of the D documents starts, and the end; no document is empty."""
    weights_path: Path | None = None
    """The file of weights, where not all are 1."""
    labels: np.ndarray | None = None
    """int32 [D], the class of each document, where they have one."""

    # A map keeps every page that was read through it in the resident memory. These live for one batch, so that reading
    # a corpus of any size takes the memory of a batch; mapping a file again costs some 10 microseconds.

    def tokens(self) -> np.ndarray:
        """[N], memory-mapped."""
        return _map(self.path, self.dtype)

    def weights(self) -> np.ndarray | None:
        """uint8 [N], memory-mapped: how much each token counts as a target; None where all count 1."""
        return None if self.weights_path is None else _map(self.weights_path, "uint8")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A source that is tokens already: flat little-endian binary files, such as nanoGPT's train.bin and val.bin."""

    train: str
    """File of the tokens to train on."""
    validation: str
    """File of the tokens to evaluate on."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the numbers in the files."""
    separator: int | None = None
    """Token that ends each document, 50256 for GPT-2's; none: a file is one document, and context runs through."""

    def documents(self, split: Split) -> Iterator[str]:
        """Raises UserError: there are no texts."""
        raise UserError(f"tokenizer: cannot be trained on {self}, which has tokens only; load the one that made them")

    def store(self, tokenizer: Tokenizer, split: Split) -> Store:
        """The store that reads the file of `split` where it is. Raises UserError."""
        path = Path(getattr(self, split)).expanduser()
        if not path.is_file():
            raise UserError(f"{split}: got {path}, where there is no file; must be a file of {self.dtype} tokens")
        itemsize = np.dtype(self.dtype).itemsize
        if path.stat().st_size == 0 or path.stat().st_size % itemsize:
            raise UserError(f"{split}: got {path} of {path.stat().st_size} bytes, must be {self.dtype} tokens")
        count, chunk = path.stat().st_size // itemsize, 1 << 22
        ends = [np.array([0])]
        for start in range(0, count, chunk):
            part = _map(path, self.dtype)[start : start + chunk]
            if part.max() >= tokenizer.vocab:
                raise UserError(
                    f"{split}: {path} has token {part.max()}, but the tokenizer's are below {tokenizer.vocab}; "
                    f"give the tokenizer that made the file, and the right dtype (got {self.dtype})"
                )
            if self.separator is not None:
                ends.append(np.flatnonzero(part == self.separator) + start + 1)
        offsets = np.concatenate(ends)
        if offsets[-1] != count:
            offsets = np.append(offsets, count)
        return Store(path, self.dtype, offsets)


class Encoded(NamedTuple):
    """A document as it is stored."""

    ids: Sequence[int]
    """Its tokens. A document without any is left out."""
    weights: Sequence[float] | None = None
    """0 or 1 for each token: whether it counts as a target. None: all do; for all documents of a source alike."""
    label: int | None = None
    """Its class, where it has one."""


Encode = Callable[[Iterator[Any], Tokenizer], Iterator[Encoded]]
"""How the documents of a kind of data are stored. A function of a module: stores are named by it."""


def encoded(
    documents: Iterator[Document], text: Callable[[Document], str], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with the ids of its text; many are encoded at a time."""
    for chunk in _chunks(documents, lambda document: len(text(document))):
        yield from zip(chunk, tokenizer.encode_batch(map(text, chunk)), strict=True)


def encode_texts(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Texts, every token of which counts."""
    return (Encoded(frame(ids, tokenizer)) for _, ids in encoded(documents, str, tokenizer))


def expect(kinds: type | tuple[type, ...], documents: Iterator[Any], source: Any) -> Iterator[Any]:
    """The documents. Raises UserError for one that is of another class than the data can read."""
    for document in documents:
        if not isinstance(document, kinds):
            raise _unexpected(type(document), kinds, source)
        yield document


def _unexpected(kind: type, kinds: type | tuple[type, ...], source: Any) -> UserError:
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
    """The stored tokens of `split`, made now unless they are there. Memory is flat in the size of the corpus.

    encode  how documents are stored
    kinds   class of the documents that it takes

    Several processes may ask for the same at once: one makes it, the others wait for it.
    Raises UserError when the split has no documents, or others than these.
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
        "encoding": f"{encode.__module__}.{encode.__qualname__}",
    }
    name = f"{split}-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]}"
    folder = Path(cache_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (store := _open(folder)) is not None:
            return store
        shutil.rmtree(folder, ignore_errors=True)
        with atomic.new(folder) as partial:
            partial.mkdir()
            documents = expect(kinds, retry.stream(lambda: source.documents(split), source), source)
            if not _write(encode(documents, tokenizer), f"{source}, {split}", tokenizer.vocab, partial, made_from):
                raise UserError(f"source: {source} has no documents for {split}; must have at least one")
    store = _open(folder)
    if store is None:
        raise OSError(f"{folder}: the tokens just written are not all there")
    return store


def _open(folder: Path) -> Store | None:
    """The store of this folder; None where there is none, or a damaged one."""
    if not folder.exists():
        return None
    try:
        header = json.loads((folder / "header.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in header["sizes"]}
        if sizes == header["sizes"]:
            return Store(
                path=folder / "tokens.bin",
                dtype=header["dtype"],
                offsets=_map(folder / "offsets.bin", "int64"),
                weights_path=folder / "weights.bin" if "weights.bin" in sizes else None,
                labels=_map(folder / "labels.bin", "int32") if "labels.bin" in sizes else None,
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s: damaged; its tokens are made again", folder)
    return None


def _write(documents: Iterator[Encoded], what: str, vocab: int, folder: Path, made_from: dict[str, Any]) -> int:
    """Store all documents in `folder`, the header last. Returns the number of tokens."""
    dtype = "uint16" if vocab <= 1 << 16 else "uint32"
    count = tokens = 0
    written = {"tokens": dtype, "offsets": "int64"}
    told = time.monotonic()
    with contextlib.ExitStack() as stack:
        names = "tokens", "offsets", "weights", "labels"
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}

        def write(name: str, values: Any, dtype: str) -> None:
            written[name] = dtype
            files[name].write(np.asarray(values, dtype).tobytes())

        write("offsets", 0, "int64")
        for document in documents:
            if not document.ids:
                continue
            count, tokens = count + 1, tokens + len(document.ids)
            write("tokens", document.ids, dtype)
            write("offsets", tokens, "int64")
            if document.weights is not None:
                write("weights", document.weights, "uint8")
            if document.label is not None:
                write("labels", document.label, "int32")
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.info("tokenizing %s: %d documents, %d tokens so far", what, count, tokens)
    for path in folder.iterdir():
        if path.stem not in written:
            path.unlink()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    header = {**made_from, "dtype": dtype, "documents": count, "tokens": tokens, "sizes": sizes}
    (folder / "header.json").write_text(json.dumps(header, indent=1))
    return tokens


def _chunks(documents: Iterator[Document], size: Callable[[Document], int]) -> Iterator[list[Document]]:
    """Lists of documents: enough to encode together, little enough to hold."""
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
