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
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from gptjax.data.chat import Conversation, render
from gptjax.data.sources import Example
from gptjax.data.tokenizers.tokenizer import frame
from gptjax.io import atomic, retry
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError

FORMAT = 1
"""Part of the name of every store: raise it when what is stored changes."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Store:
    """The tokens of one split of one source."""

    path: Path
    """The file of tokens."""
    dtype: str
    """Their type, "uint16" or "uint32"."""
    offsets: np.ndarray
    """int64 [D + 1], where each of the D documents starts, and the end; no document is empty."""
    targets: int
    """How many tokens have weight 1 as a target: all but the first of each document, or what the assistant says."""
    text_bytes: int | None
    """UTF-8 bytes of the text that these targets spell; None where only the tokens are known."""
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
        return Store(path, self.dtype, offsets, count - len(offsets) + 1, text_bytes=None)


def tokenize(source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> Store:
    """The stored tokens of `split`, made now unless they are there. Memory is flat in the size of the corpus.

    Several processes may ask for the same at once: one makes it, the others wait for it.
    Raises UserError when the split has no documents.
    """
    if isinstance(source, Tokens):
        return source.store(tokenizer, split)
    made_from = {"format": FORMAT, "source": source.fingerprint(), "tokenizer": tokenizer.fingerprint, "split": split}
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
            _write(source, tokenizer, split, partial, made_from)
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
                targets=header["targets"],
                text_bytes=header["text_bytes"],
                weights_path=folder / "weights.bin" if "weights.bin" in sizes else None,
                labels=_map(folder / "labels.bin", "int32") if "labels.bin" in sizes else None,
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s: damaged; its tokens are made again", folder)
    return None


def _write(source: Source, tokenizer: Tokenizer, split: Split, folder: Path, made_from: dict) -> None:
    """Tokenise all documents of the split into `folder`, the header last."""
    dtype = "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"
    documents = tokens = targets = text_bytes = 0
    written = {"tokens", "offsets"}
    told = time.monotonic()
    with contextlib.ExitStack() as files:
        names = "tokens", "offsets", "weights", "labels"
        tokens_file, offsets_file, weights_file, labels_file = (
            files.enter_context(open(folder / f"{name}.bin", "wb")) for name in names
        )
        np.zeros(1, np.int64).tofile(offsets_file)
        for chunk in _chunks(retry.stream(lambda: source.documents(split), source)):
            if not isinstance(chunk[0], str | Example):
                written.add("weights")
                rendered = [render(conversation, tokenizer) for conversation in chunk]
                ids = [ids for ids, _ in rendered]
                for _, weights in rendered:
                    targets += int(sum(weights[1:]))
                    np.array(weights, np.uint8).tofile(weights_file)
            else:
                ids = [frame(text, tokenizer) for text in tokenizer.encode_batch(list(map(_text, chunk)))]
                if isinstance(chunk[0], Example):
                    written.add("labels")
                    labels = [e.label for e, document in zip(chunk, ids, strict=True) if document]
                    np.array(labels, np.int32).tofile(labels_file)
                ids = [document for document in ids if document]
                targets += sum(map(len, ids)) - len(ids)
            lengths = np.array([len(document) for document in ids], np.int64)
            for document in ids:
                np.array(document, dtype).tofile(tokens_file)
            (tokens + np.cumsum(lengths)).tofile(offsets_file)
            documents, tokens = documents + len(ids), tokens + int(lengths.sum())
            text_bytes += sum(map(_learned_bytes, chunk))
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.info("tokenizing %s, %s: %d documents, %d tokens so far", source, split, documents, tokens)
    if not tokens:
        raise UserError(f"source: {source} has no documents for {split}; must have at least one")
    for path in folder.iterdir():
        if path.stem not in written:
            path.unlink()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    counts = {"documents": documents, "tokens": tokens, "targets": targets, "text_bytes": text_bytes}
    (folder / "header.json").write_text(json.dumps({**made_from, "dtype": dtype, **counts, "sizes": sizes}, indent=1))


def _chunks(documents: Iterator) -> Iterator[list]:
    """Lists of documents: enough to encode together, little enough to hold."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(_text(document))
        if size > 1 << 20 or len(chunk) == 1024:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _text(document: str | Example | Conversation) -> str:
    """All that there is to read in a document."""
    if isinstance(document, str | Example):
        return document if isinstance(document, str) else document.text
    return "".join(message.content for message in document)


def _learned_bytes(document: str | Example | Conversation) -> int:
    """UTF-8 bytes of the text that a model learns to write from this document."""
    if isinstance(document, str | Example):
        return len(_text(document).encode(errors="surrogatepass"))
    return sum(_learned_bytes(message.content) for message in document if message.role == "assistant")


def _map(path: Path, dtype: str) -> np.ndarray:
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
