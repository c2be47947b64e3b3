"""Cleaning from the first step to the last: phases of parts in a folder for work, the report, the documents left."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import digest, to_json
from gptjax.data.files import file_state
from gptjax.data.prepare.parts import Parts, Phase, make, phases
from gptjax.data.prepare.report import Report, StepReport
from gptjax.data.prepare.steps import CorpusStep, Document, Found, Step, Table
from gptjax.io import atomic
from gptjax.types import UserError

log = logging.getLogger(__name__)
VERSION = 1
"""Version of the steps' rules, part of every fingerprint."""


def fingerprint(steps: Sequence[Step | CorpusStep], source: str) -> str:
    """SHA-256, in hex, of the steps, the files that they read and the fingerprint of their source."""
    files = [file_state(path) for step in steps for path in step.files()]
    return digest([VERSION, source, [_named(step) for step in steps], files])


def _named(step: Any) -> Any:
    return to_json(step) if hasattr(step, "__dataclass_fields__") else type(step).__qualname__


def clean(
    documents: Callable[[], Iterator[Document]],
    steps: Sequence[Step | CorpusStep],
    work: Path,
    made_from: str,
    processes: int = 1,
    module: Path | None = None,
) -> tuple[Report, Iterator[Document]]:
    """The report, and the documents that all steps keep, in their order. `work` holds what is done, for the next start;
    it can be deleted when the documents have been read.

    documents  function that reads the documents, the same ones each time
    made_from  fingerprint of documents and steps: `work` of another is an error
    module     Python file that defines classes of steps, or None
    """
    if processes < 1:
        raise UserError(f"processes: got {processes}, must be at least 1")
    _claim(work, made_from)
    read = _Counted(documents)
    parts: Parts | None = None
    dropped: frozenset[int] = frozenset()
    reports: list[StepReport] = []
    tables: list[Table] = []
    for number, phase in enumerate(phases(steps)):
        folder = work / f"phase{number}"
        source = read() if parts is None else parts.documents(dropped)
        parts = make(source, phase, folder, processes, module, _Progress(phase))
        reports += parts.reports() or [StepReport(type(step).__name__) for step in phase.steps]
        dropped = frozenset()
        if phase.corpus is not None:
            found = _find(phase.corpus, parts, folder)
            dropped = frozenset(one.document for one in found)
            reports.append(_compared(phase.corpus, parts, dropped))
            tables += _clusters(phase.corpus, parts, found)
    assert parts is not None
    tables += [table for step in steps if isinstance(step, Step) and (table := step.appendix()) is not None]
    return Report(read.documents, read.characters, reports, tables), parts.documents(dropped)


class _Counted:
    """Reads documents and counts them."""

    def __init__(self, documents: Callable[[], Iterator[Document]]):
        self._documents = documents
        self.documents = self.characters = 0

    def __call__(self) -> Iterator[Document]:
        for document in self._documents():
            self.documents += 1
            self.characters += len(document.text)
            yield document


class _Progress:
    """Logs the number of documents that are done, every ten seconds."""

    def __init__(self, phase: Phase):
        steps = [type(step).__name__ for step in (*phase.steps, phase.corpus) if step is not None]
        self._steps, self._done, self._start = ", ".join(steps), 0, time.monotonic()
        self._told = self._start

    def __call__(self, documents: int) -> None:
        self._done += documents
        now = time.monotonic()
        if now - self._told > 10:
            self._told = now
            rate = self._done / (now - self._start)
            log.info("%s: %d documents, %.0f a second", self._steps, self._done, rate)


def _claim(work: Path, made_from: str) -> None:
    """Mark a folder for work. Raises UserError if it holds the work of another cleaning."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / "made_from"
    if not mark.exists() or not any(work.glob("*/*.json")):
        atomic.write_text(mark, made_from)
    elif mark.read_text() != made_from:
        raise UserError(f"out: {work} holds the unfinished work of other files or steps; delete it, or choose another")


def _find(step: CorpusStep, parts: Parts, folder: Path) -> list[Found]:
    """Documents to drop, found once."""
    path = folder / "found.npy"
    if not path.exists():
        temporary = folder / "compare"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        found = np.array(step.find(parts, temporary), np.int64).reshape(-1, 2)
        shutil.rmtree(temporary)
        with atomic.new(path) as partial, open(partial, "wb") as file:
            np.save(file, found)
    return [Found(*map(int, row)) for row in np.load(path)]


def _compared(step: CorpusStep, parts: Parts, dropped: frozenset[int]) -> StepReport:
    """Counts of a step that compares documents."""
    report = StepReport(type(step).__name__)
    for number, document in enumerate(parts.documents()):
        if number in dropped:
            report.drop(document.text, step.reason)
        else:
            report.keep(document.text, document.text)
    return report


LARGEST = 10


def _clusters(step: CorpusStep, parts: Parts, found: list[Found]) -> list[Table]:
    """The largest clusters of documents that are alike."""
    sizes: dict[int, int] = {}
    for one in found:
        sizes[one.kept] = sizes.get(one.kept, 1) + 1
    largest = sorted(sizes, key=lambda kept: (-sizes[kept], kept))[:LARGEST]
    rows = tuple((sizes[kept], " ".join(parts.text(kept)[:100].split())) for kept in largest)
    return [Table(f"{type(step).__name__}: largest clusters", ("documents", "the one kept"), rows)] if rows else []


def write_report(report: Report, folder: Path) -> None:
    """Write report.md and report.json."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    atomic.write_text(folder / "report.md", report.markdown())
    atomic.write_text(folder / "report.json", json.dumps(report.to_json(), indent=1, ensure_ascii=False))
