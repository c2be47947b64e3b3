"""Making of token stores: a source is tokenised in shards, by several processes or machines, whose number changes
nothing of what is stored.

A source that is read file by file has parts of at least `PART` bytes of files; any other is one part. A shard is the
next `SHARD` characters of a part's documents. Processes encode chunks of documents; one process reads and writes. A
shard is written whole or not at all, so that what was stopped, however it was, goes on after the last shard. With
several workers, on one machine or many, each makes its own shards: of its own parts, or, of a source with fewer parts
than workers, every so-many-th of a part that it reads from beginning to end. The last one writes the header.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import digest
from gptjax.data.encoding import (
    DROPPED,
    UNTAUGHT,
    Chunk,
    Encode,
    Encoder,
    Job,
    characters,
    chunks,
    encode_texts,
    expect,
    in_order,
    token_dtype,
    unexpected,
)
from gptjax.data.sources import NoDocuments
from gptjax.data.store import (
    Folder,
    LocalFolder,
    Store,
    TokenFile,
    Tokens,
    file_facts,
    folder_at,
    open_store,
    read_labels,
    sealed,
    unsealed,
)
from gptjax.io import atomic, retry
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError

FORMAT = 5
"""Format version, part of the name of every store."""
SHARD = 1 << 27
"""Characters after which a shard ends."""
PART = 1 << 27
"""Bytes of files after which a part ends."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Workers:
    """Processes that make a store together."""

    processes: int = 1
    """Processes on this machine that encode."""
    index: int = 0
    """This worker, from 0."""
    count: int = 1
    """Number of workers."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"processes: got {self.processes}, must be at least 1")
        if not 0 <= self.index < self.count:
            raise UserError(f"worker: got {self.index}/{self.count}, must be from 0/{self.count} to {self.count - 1}")


def tokenize(
    source: Source | Tokens,
    tokenizer: Tokenizer,
    split: Split,
    cache_dir: str | Path,
    encode: Encode = encode_texts,
    kinds: type | tuple[type, ...] = str,
) -> Store:
    """Tokens of `split`, stored now unless they are already. Memory does not grow with the corpus.

    cache_dir  folder of the stores; or a bucket, in which they must be already
    encode     encoding of the documents
    kinds      classes of documents that `encode` accepts

    If several processes ask for the same store at once, one makes it and the others wait. Raises UserError if the split
    has no documents, or documents of another class.
    """
    if isinstance(source, Tokens):
        if not issubclass(str, kinds):
            raise unexpected(str, kinds, source)
        return source.store(tokenizer, split)
    store = make_store(
        source, tokenizer, split, cache_dir, encode, kinds, None if "://" in str(cache_dir) else Workers()
    )
    if store is None:
        raise UserError(
            f"tokens: got {cache_dir}, which has no {split} tokens of {source} for this tokenizer and data; make them "
            "with gptjax data prepare, or leave the option out"
        )
    done, total = _listed(store.notes), len(store.offsets) - 1 + store.notes.get(DROPPED, 0)
    if store.notes.get(UNTAUGHT, 0) >= len(store.offsets) - 1:
        raise UserError(
            f"source: {source} has nothing to learn for {split}: of {total:,} documents, {done}; conversations need "
            "an assistant's turn, and a length that holds it with its question"
        )
    if done:
        log.warning("%s, %s: of %d documents, %s", source, split, total, done)
    return store


def make_store(
    source: Source,
    tokenizer: Tokenizer,
    split: Split,
    cache_dir: str | Path,
    encode: Encode,
    kinds: type | tuple[type, ...],
    workers: Workers | None,
) -> Store | None:
    """The store of a split, made now unless it is there. None: other workers have shards to make; or, with `workers`
    None, it is not there. Raises as `tokenize`."""
    made_from = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
        "split": split,
        "encoding": f"{encode.__module__}.{getattr(encode, '__qualname__', encode)}",
    }
    folder = folder_at(cache_dir, f"{split}-{digest(made_from)[:16]}")
    with contextlib.ExitStack() as stack:
        if isinstance(folder, LocalFolder):
            parent = folder.path.parent
            stack.enter_context(atomic.usable(parent, "cache", "set GPTJAX_CACHE to another folder"))
            parent.mkdir(parents=True, exist_ok=True)
            index, count = (workers.index, workers.count) if workers else (0, 1)
            name = f"{folder.path.name}{f'.{index}-of-{count}' if count > 1 else ''}.lock"
            stack.enter_context(atomic.lock(parent / name))
        store = open_store(folder, tokenizer.vocab)
        if store is not None or workers is None:
            return store
        making = _Making(source, split, kinds, Encoder(encode, tokenizer, f"{source}, {split}"), folder, workers)
        making.run()
        if not making.finish(made_from):
            return None
        store = open_store(folder, tokenizer.vocab)
    if store is None:
        raise UserError(f"cache: the tokens just written to {folder.address} are not as written; check the disk")
    return dataclasses.replace(store, found=False)


def _listed(notes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {note}" for note, count in notes.items())


def parts_of(source: Source) -> list[list[Source]]:
    """Parts of a source: sources whose documents, one source after the other, are all of them."""
    files: Callable[[], Iterable[tuple[Source, int]]] | None = getattr(source, "files", None)
    if files is None:
        return [[source]]
    parts: list[list[Source]] = [[]]
    filled = 0
    for file, size in files():
        if filled >= PART:
            parts.append([])
            filled = 0
        parts[-1].append(file)
        filled += size
    return parts


class _Making:
    """The making of a store."""

    def __init__(
        self,
        source: Source,
        split: Split,
        kinds: type | tuple[type, ...],
        encoder: Encoder,
        folder: Folder,
        workers: Workers,
    ):
        self.source, self.kinds, self.folder = source, kinds, folder
        self.split: Split = split
        self.encoder, self.workers, self.parts = encoder, workers, parts_of(source)
        names = self.folder.names()
        self.headers = {name: header for name in names if (header := self._header(name)) is not None}

    def run(self) -> None:
        """Make the shards of this worker that are not there."""
        pending: list[Chunk] = []
        documents = tokens = 0
        told = time.monotonic()
        with contextlib.closing(in_order(self._jobs(), self.encoder, self.workers.processes)) as encoded:
            for job, chunk in encoded:
                if chunk is None:
                    continue
                pending.append(chunk)
                documents, tokens = documents + len(chunk.sizes), tokens + len(chunk.tokens)
                if job.ends:
                    self._write(job, pending)
                    pending = []
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    log.info("tokenizing %s: %d documents, %d tokens so far", self.encoder.what, documents, tokens)

    def _jobs(self) -> Iterator[Job]:
        """Chunks of the parts that this worker reads."""
        by_part = len(self.parts) >= self.workers.count
        for part, sources in enumerate(self.parts):
            if by_part and part % self.workers.count != self.workers.index:
                continue
            if self._complete(part):
                continue
            shard = first = filled = 0
            found = chunks(self._documents(sources), characters)
            following = next(found, None)
            if following is None:
                yield Job(part, 0, [] if by_part or not self.workers.index else None, 0, True, True)
            while following is not None:
                documents, following = following, next(found, None)
                filled += sum(map(characters, documents))
                last = following is None
                ends = last or filled >= SHARD
                theirs = not by_part and shard % self.workers.count != self.workers.index
                done = theirs or f"{_name(part, shard)}.json" in self.headers
                yield Job(part, shard, None if done else documents, first, ends, last)
                first += len(documents)
                if ends:
                    shard, filled = shard + 1, 0

    def _documents(self, sources: list[Source]) -> Iterator[Any]:
        for source in sources:
            try:
                read = functools.partial(source.documents, self.split)
                yield from expect(self.kinds, retry.stream(read, source), self.source)
            except NoDocuments:
                if len(self.parts) == len(sources) == 1:
                    raise

    def _write(self, job: Job, pending: list[Chunk]) -> None:
        """Write a shard, its .json last."""
        name = _name(job.part, job.shard)
        arrays = {"tokens": [c.tokens for c in pending], "sizes": [c.sizes for c in pending]}
        if any(c.weights is not None for c in pending):
            arrays["weights"] = [c.weights for c in pending if c.weights is not None]
        if any(c.labels is not None for c in pending):
            arrays["labels"] = [c.labels for c in pending if c.labels is not None]
        together = {f"{name}.{kind}.bin": np.concatenate(values) for kind, values in arrays.items()}
        tokens, weights = together[f"{name}.tokens.bin"], together.get(f"{name}.weights.bin")
        file = TokenFile(f"{name}.tokens.bin", len(tokens))
        if weights is not None:
            file = dataclasses.replace(file, weights=f"{name}.weights.bin", weights_dtype=str(weights.dtype))
        labels, facts = together.get(f"{name}.labels.bin"), {}
        for path, values in together.items():
            data = values.tobytes()
            self.folder.write(path, data)
            facts[path] = file_facts(data)
        header = {
            "file": dataclasses.asdict(file),
            "files": facts,
            "labels": None if labels is None else [str(labels.dtype), *labels.shape[1:]],
            "documents": len(together[f"{name}.sizes.bin"]),
            "notes": sum((collections.Counter(c.notes) for c in pending), collections.Counter()),
            "last": job.last,
        }
        self.folder.write(f"{name}.json", sealed(header))
        self.headers[f"{name}.json"] = header

    def _header(self, name: str) -> dict[str, Any] | None:
        """Header of a shard. None: another file, or a shard that is damaged and made again."""
        if not name.endswith(".json") or name == "header.json":
            return None
        try:
            header = unsealed(self.folder.read(name))
            _ = header["labels"]
            for file, facts in header["files"].items():
                whole = self.folder.local
                if (file_facts(self.folder.read(file)) if whole else {"size": self.folder.size(file)}) != (
                    facts if whole else {"size": facts["size"]}
                ):
                    raise ValueError(f"{file} is not as it was written")
            return header
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s/%s: damaged (%s); tokenizing this shard again", self.folder.address, name, error)
            return None

    def _complete(self, part: int) -> bool:
        """True if all shards of a part are there."""
        shard = 0
        while (header := self.headers.get(f"{_name(part, shard)}.json")) is not None:
            if header["last"]:
                return True
            shard += 1
        return False

    def finish(self, made_from: Mapping[str, Any]) -> bool:
        """Write offsets, labels and the header. False: other workers have shards to make. Raises UserError if there is
        no token."""
        if self.workers.count > 1:
            for name in self.folder.names() - self.headers.keys():
                if (header := self._header(name)) is not None:
                    self.headers[name] = header
        if not all(map(self._complete, range(len(self.parts)))):
            return False
        names = sorted(self.headers)
        headers = [self.headers[name] for name in names]
        used = [header for header in headers if header["file"]["tokens"]]
        notes = sum((collections.Counter(header["notes"]) for header in headers), collections.Counter())
        if not used:
            done = f" ({_listed(notes)}; a larger length holds more)" if notes else ""
            raise UserError(f"source: {self.source} has no documents for {self.split}{done}; must have at least one")
        sizes = np.concatenate([self.folder.array(self._of(h, "sizes"), "int64") for h in used])
        files = {"offsets.bin": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)}
        if used[0]["labels"] is not None:
            of_shards = [read_labels(self.folder, self._of(h, "labels"), h["labels"]) for h in used]
            files["labels.bin"] = np.concatenate(of_shards)
        for name, values in files.items():
            self.folder.write(name, values.tobytes())
        shards = []
        for header in used:
            read = {name for name in (header["file"]["name"], header["file"]["weights"]) if name is not None}
            shards.append({"file": header["file"], "read": {name: header["files"][name] for name in sorted(read)}})
        header = {
            **made_from,
            "dtype": token_dtype(self.encoder.tokenizer.vocab),
            "documents": len(sizes),
            "tokens": int(sizes.sum()),
            "notes": notes,
            "labels": used[0]["labels"],
            "files": {name: file_facts(values.tobytes()) for name, values in files.items()},
            "shards": shards,
        }
        self.folder.write("header.json", sealed(header))
        if isinstance(self.folder, LocalFolder):
            for left in self.folder.path.glob(f"*{atomic.SUFFIX}"):  # by processes that were killed
                left.unlink(missing_ok=True)
        return True

    @staticmethod
    def _of(header: Mapping[str, Any], kind: str) -> str:
        return header["file"]["name"].replace(".tokens.", f".{kind}.")


def _name(part: int, shard: int) -> str:
    return f"{part:05}-{shard:05}"
