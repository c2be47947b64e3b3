"""Cleaning of files into files: `gptjax data clean`."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from gptjax.config import digest
from gptjax.data.prepare.messages import check_steps, joined, replaced
from gptjax.data.prepare.pipeline import documents_of
from gptjax.data.prepare.report import Report
from gptjax.data.prepare.run import clean, fingerprint, write_report
from gptjax.data.prepare.steps import CorpusStep, Document, Step
from gptjax.data.sources import Text
from gptjax.data.tables import Csv, Jsonl, Parquet
from gptjax.io import atomic
from gptjax.types import UserError, one_line

Format = Literal["jsonl", "jsonl.gz", "parquet"]


def source_of(path: str, text: str) -> Any:
    """Source of all documents of a file or glob, by the ending of its name."""
    name = path.removesuffix(".gz")
    for ending, kind in ((".parquet", Parquet), (".csv", Csv), (".tsv", Csv), (".jsonl", Jsonl), (".json", Jsonl)):
        if name.endswith(ending):
            return kind(path, text=text, validation=0.0)
    if name.endswith((".txt", ".md")):
        return Text(path, validation=0.0)
    raise UserError(
        f"files: got {path}, must end in .jsonl, .json, .parquet, .csv, .tsv, .txt or .md (with .gz or not)"
    )


def clean_files(
    paths: Sequence[str],
    out: Path,
    steps: Sequence[Step | CorpusStep],
    text: str = "text",
    format: Format = "jsonl.gz",
    shard: int = 256,
    processes: int = 1,
    module: Path | None = None,
) -> Report:
    """Clean files into shards in the folder `out`, with report.md and report.json. A start after an interruption does
    not repeat what is done. Raises UserError if `out` is complete, or of other files or steps.

    text    column with the text, or with the messages of a conversation; the other columns are kept
    shard   megabytes of text per shard, which is held in memory for Parquet
    module  Python file that defines classes of steps, or None
    """
    if shard < 1:
        raise UserError(f"shard: got {shard}, must be at least 1 megabyte")
    if (out / "report.json").exists():
        raise UserError(f"out: got {out}, which holds a complete cleaning; choose another folder")
    if out.exists() and not {path.name for path in out.iterdir()} <= {"unfinished", "report.md", *_shards_of(out)}:
        raise UserError(f"out: got {out}, which holds other files; choose another folder")
    sources = [source_of(path, text) for path in paths]
    made_from = fingerprint(steps, digest([source.fingerprint() for source in sources]))

    def documents() -> Iterator[Document]:
        for source in sources:
            for document in documents_of(source, "train", joined):
                if text in document.fields:
                    check_steps(steps)
                yield document

    with atomic.usable(out, "out", "choose another folder"):
        work = out / "unfinished"
        report, kept = clean(documents, steps, work, made_from, processes, module)
        if not report.kept:
            atomic.write_text(out / "report.md", report.markdown())
            shutil.rmtree(work)
            raise UserError(f"recipe: keeps none of {report.documents} documents; see {out / 'report.md'}")
        for name in _shards_of(out):  # of an interrupted cleaning, perhaps of another size
            (out / name).unlink()
        for number, rows in enumerate(_shards(kept, text, shard * 1_000_000)):
            with atomic.new(out / f"{number:05}.{format}") as partial:
                _WRITERS[format](partial, rows)
        write_report(report, out)
        shutil.rmtree(work)
    return report


def _shards_of(out: Path) -> set[str]:
    """Names of the shards of an unfinished cleaning in a folder."""
    if not (out / "unfinished").exists():
        return set()
    return {path.name for path in out.iterdir() if re.fullmatch(r"\d{5}\.(jsonl|jsonl\.gz|parquet)", path.name)}


def _shards(documents: Iterator[Document], text: str, size: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Rows of each shard, to be read before those of the next."""

    def rows(first: Document) -> Iterator[dict[str, Any]]:
        characters = 0
        for document in itertools.chain([first], documents):
            messages = document.fields.get(text)
            said = document.text if messages is None else replaced(messages, document.text)
            yield {**document.fields, text: said} if messages is not None else {text: said, **document.fields}
            characters += len(document.text)
            if characters >= size:
                return

    for document in documents:
        yield rows(document)


def _jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _gzip(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    # Without a time and a name in its header, the same rows are the same bytes.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    table = [*rows]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("format: parquet needs the pyarrow library; pip install 'gptjax[hf]'") from None
    names = list(dict.fromkeys(name for row in table for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pyarrow.array([row.get(name) for row in table])
        except pyarrow.ArrowException as error:
            raise UserError(
                f"format: parquet cannot hold the column {name!r} ({one_line(error)}); choose jsonl"
            ) from None
    parquet.write_table(pyarrow.table(columns), path)


_WRITERS: dict[str, Callable[[Path, Iterator[dict[str, Any]]], None]] = {
    "jsonl": _jsonl,
    "jsonl.gz": _gzip,
    "parquet": _parquet,
}
