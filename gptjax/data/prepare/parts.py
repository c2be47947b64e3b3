"""Parts of a cleaning: chunks of documents, cleaned by one process each and kept on disk until all are done.

    folder/000000.jsonl   {"text": ..., "split": ..., "fields": {...}} of the documents that the steps kept
           000000.npz     start of each document in that file, and its signature for the step that compares documents
           000000.json    counts; written last

A document's part does not depend on the number of processes, and a part that is there is not made again.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import dataclasses
import datetime
import decimal
import functools
import importlib.util
import itertools
import json
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.prepare.report import StepReport
from gptjax.data.prepare.steps import CorpusStep, Document, Drop, Edit, Step
from gptjax.io import atomic
from gptjax.types import UserError

CHARACTERS, DOCUMENTS = 4_000_000, 4_000
"""Limits of a part."""
Submit = Callable[[Path, list[Document]], "concurrent.futures.Future[int]"]


class Phase(NamedTuple):
    """Steps that read one document at a time, then one that compares all, if there is one."""

    steps: tuple[Step, ...]
    corpus: CorpusStep | None


def phases(steps: Sequence[Step | CorpusStep]) -> list[Phase]:
    """The steps, divided after each that compares documents."""
    found: list[Phase] = []
    pending: list[Step] = []
    for step in steps:
        if isinstance(step, CorpusStep):
            found.append(Phase(tuple(pending), step))
            pending = []
        else:
            pending.append(step)
    return [*found, Phase(tuple(pending), None)] if pending or not found else found


@dataclasses.dataclass(frozen=True)
class Parts:
    """Documents that a phase kept, on disk."""

    folder: Path
    count: int
    """Number of parts."""
    starts: tuple[int, ...]
    """Number of the first document of each part, and of all documents."""

    def __len__(self) -> int:
        return self.starts[-1]

    def signatures(self) -> Iterator[np.ndarray]:
        """The documents' signatures, part by part."""
        for part in range(self.count):
            with np.load(self._path(part, ".npz")) as arrays:
                yield arrays["signatures"]

    def text(self, document: int) -> str:
        """The text of a document, by its number."""
        part = bisect.bisect_right(self.starts, document) - 1
        offset = int(self._offsets[part][document - self.starts[part]])
        with open(self._path(part, ".jsonl"), "rb") as file:
            file.seek(offset)
            return json.loads(file.readline())["text"]

    @functools.cached_property
    def _offsets(self) -> list[np.ndarray]:
        """Start of each document in the file of its part."""
        found = []
        for part in range(self.count):
            with np.load(self._path(part, ".npz")) as arrays:
                found.append(arrays["offsets"])
        return found

    def documents(self, without: Container[int] = ()) -> Iterator[Document]:
        """The documents in their order, without those of these numbers."""
        number = itertools.count()
        for part in range(self.count):
            with open(self._path(part, ".jsonl"), encoding="utf-8", newline="\n") as file:
                for line in file:
                    if next(number) not in without:
                        row = json.loads(line)
                        yield Document(row["text"], row["fields"], row["split"])

    def reports(self) -> list[StepReport]:
        """Counts of the phase's steps, over all parts."""
        total: list[StepReport] = []
        for part in range(self.count):
            data = json.loads(self._path(part, ".json").read_text(encoding="utf-8"))
            steps = list(map(StepReport.from_json, data["steps"]))
            for mine, theirs in zip(total, steps, strict=False):
                mine.add(theirs)
            total = total or steps
        return total

    def _path(self, part: int, suffix: str) -> Path:
        return self.folder / f"{part:06}{suffix}"


def make(
    documents: Iterable[Document],
    phase: Phase,
    folder: Path,
    processes: int,
    module: Path | None,
    progress: Callable[[int], None],
) -> Parts:
    """Clean the documents in parts, those that are not there yet.

    module    Python file that defines classes of steps, or None
    progress  called with the number of documents of each part that is done
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with _workers(phase, processes, module) as submit:
        waiting: set[concurrent.futures.Future[int]] = set()

        def take() -> None:
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for part in done:
                waiting.remove(part)
                progress(part.result())

        for number, chunk in enumerate(_chunks(documents)):
            count, path = number + 1, folder / f"{number:06}"
            if path.with_suffix(".json").exists():
                progress(len(chunk))
                continue
            waiting.add(submit(path, chunk))
            while len(waiting) >= 2 * processes:
                take()
        while waiting:
            take()
    kept = [json.loads((folder / f"{part:06}.json").read_text(encoding="utf-8"))["kept"] for part in range(count)]
    return Parts(folder, count, tuple(itertools.accumulate(kept, initial=0)))


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHARACTERS or len(chunk) >= DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _workers(phase: Phase, processes: int, module: Path | None) -> Iterator[Submit]:
    """A function that lets one of the processes make a part; this one, if it is the only one."""
    if processes == 1:

        def here(path: Path, chunk: list[Document]) -> concurrent.futures.Future[int]:
            done: concurrent.futures.Future[int] = concurrent.futures.Future()
            done.set_result(_make_part(phase, path, chunk))
            return done

        yield here
        return
    start = (pickle.dumps(phase), module)
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, start)
    try:
        yield lambda path, chunk: pool.submit(_make_part_there, path, chunk)
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "processes: one of them ended without a word, as the system ends it when memory is short; start again with "
            "fewer, and the parts that are done are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_phase: Phase | None = None
"""The phase of a worker process."""


def _start_worker(phase: bytes, module: Path | None) -> None:
    global _phase
    if module is not None:
        load_module(module)
    _phase = pickle.loads(phase)


def _make_part_there(path: Path, chunk: list[Document]) -> int:
    assert _phase is not None
    return _make_part(_phase, path, chunk)


def load_module(path: Path) -> ModuleType:
    """The module of a Python file, under a name of its own."""
    name = f"gptjax_steps_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _make_part(phase: Phase, path: Path, chunk: list[Document]) -> int:
    """Clean a part. Returns the number of its documents before."""
    counts = [StepReport(type(step).__name__) for step in phase.steps]
    kept = [done for document in chunk if (done := clean_one(document, phase.steps, counts)) is not None]
    offsets, at = np.zeros(len(kept), np.int64), 0
    with atomic.new(path.with_suffix(".jsonl")) as partial, open(partial, "wb") as file:
        for i, document in enumerate(kept):
            row = {"text": document.text, "split": document.split, "fields": dict(document.fields)}
            offsets[i] = at
            at += file.write(json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8") + b"\n")
    corpus = phase.corpus
    signatures = np.zeros(len(kept)) if corpus is None else corpus.signature([document.text for document in kept])
    with atomic.new(path.with_suffix(".npz")) as partial, open(partial, "wb") as file:
        np.savez(file, offsets=offsets, signatures=signatures)
    done = {"kept": len(kept), "steps": [count.to_json() for count in counts]}
    atomic.write_text(path.with_suffix(".json"), json.dumps(done, ensure_ascii=False))
    return len(chunk)


def clean_one(document: Document, steps: Sequence[Step], counts: Sequence[StepReport]) -> Document | None:
    """A document after all steps, or None if one drops it."""
    for step, count in zip(steps, counts, strict=True):
        before, result = document.text, step(document.text)
        if isinstance(result, Drop):
            count.drop(before, result.reason)
            return None
        edit = result if isinstance(result, Edit) else Edit(result, {})
        after = edit.text
        if not after.strip():
            count.drop(before, "empty")
            return None
        count.keep(before, after, edit.reasons, edit.private)
        if after != before:
            document = dataclasses.replace(document, text=after)
    return document


def _plain(value: Any) -> Any:
    """A value of a Parquet file as JSON."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise UserError(f"columns: got a value of {type(value).__name__} beside the text, must be values of JSON")
