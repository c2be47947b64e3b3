"""A source of cleaned texts: a source and steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.data.files import Where, cache_dir
from gptjax.data.prepare.run import clean, fingerprint, write_report
from gptjax.data.prepare.steps import CorpusStep, Document, Step
from gptjax.data.tables import Table, column
from gptjax.io import atomic
from gptjax.protocols import Source, Split
from gptjax.types import Json, UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The texts of a source that steps keep, as they change them. They are cleaned once, into $GPTJAX_CACHE/cleaned,
    with a report.

    Both splits are cleaned as one corpus, the validation split first: a document for training that is a duplicate of
    one for validation is dropped."""

    source: Source[str]
    steps: tuple[Step | CorpusStep, ...]
    processes: int = 1
    """Processes for the steps that read one document at a time. Any number gives the same texts."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise UserError("steps: got none, must be at least one")
        if self.processes < 1:
            raise UserError(f"processes: got {self.processes}, must be at least 1")

    @property
    def validation(self) -> Any:
        """That of the source: 0 if it has no validation split."""
        return getattr(self.source, "validation", None)

    def documents(self, split: Split) -> Iterator[str]:
        path = self.folder() / f"{split}.jsonl"
        with open(path, encoding="utf-8", newline="\n") as file:
            empty = True
            for line in file:
                empty = False
                yield json.loads(line)
        if empty:
            raise UserError(f"steps: keep no document of {self.source} for {split}; see {path.with_name('report.md')}")

    def fingerprint(self) -> str:
        return fingerprint(self.steps, self.source.fingerprint())

    def report(self) -> Path:
        """The report, as Markdown; report.json is beside it."""
        return self.folder() / "report.md"

    def folder(self) -> Path:
        """Folder with the texts, cleaned now unless they are there."""
        made_from = self.fingerprint()
        folder = cache_dir() / "cleaned" / hashlib.sha256(made_from.encode()).hexdigest()[:16]
        with atomic.usable(folder.parent, "cache", "set GPTJAX_CACHE to another folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic.lock(folder.with_suffix(".lock")):
                if not folder.exists():
                    self._clean(folder, made_from)
        return folder

    def _clean(self, folder: Path, made_from: str) -> None:
        work = folder.with_suffix(".work")
        report, documents = clean(self._documents, self.steps, work, made_from, self.processes)
        with atomic.new(folder) as partial:
            partial.mkdir()
            with (
                open(partial / "train.jsonl", "w", encoding="utf-8") as train,
                open(partial / "validation.jsonl", "w", encoding="utf-8") as validation,
            ):
                files = {"train": train, "validation": validation}
                for document in documents:
                    files[document.split].write(json.dumps(document.text, ensure_ascii=False) + "\n")
            write_report(report, partial)
        shutil.rmtree(work)
        log.info("%s: kept %d of %d documents: %s", self.source, report.kept, report.documents, folder / "report.md")

    def _documents(self) -> Iterator[Document]:
        """Those for validation, then those for training."""
        if self.validation != 0:
            yield from documents_of(self.source, "validation")
        yield from documents_of(self.source, "train")


def documents_of(source: Any, split: Split, conversation: Callable[[Any], str] | None = None) -> Iterator[Document]:
    """The documents of a split of a source; of a table, with the other columns of their rows.

    conversation  text of a list of messages, which is kept in its column. None: lists are refused
    """
    if not isinstance(source, Table):
        for text in source.documents(split):
            yield Document(text, {}, split)
        return

    def of_row(where: Where, row: Json) -> tuple[str, Document] | None:
        text = column(row, source.text, where, "text")
        if conversation is not None and isinstance(text, list):
            try:
                return "", Document(conversation(text), row, split)
            except UserError as error:
                raise UserError(f"{source.text}: {where}: {error}") from None
        if text is not None and not isinstance(text, str):
            raise UserError(f"text: {where}: got {type(text).__name__} in {source.text!r}, must be text")
        if text is None or not text.strip():
            return None
        fields = {name: value for name, value in row.items() if name != source.text}
        return text, Document(text, fields, split)

    yield from source.read(split, of_row)
