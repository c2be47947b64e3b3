"""Tables: JSON, CSV and Parquet files with named columns.

A table is a source of the texts in one of its columns. `Conversations` reads the same tables, whole row by whole row.
"""

from __future__ import annotations

import abc
import csv
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from gptjax.data.files import Where, file_state, find_files, read_json, read_lines
from gptjax.data.sources import check_fraction, fingerprint, of_split, one_each
from gptjax.protocols import Split
from gptjax.types import Json, UserError, one_line

Document = TypeVar("Document")
OfRow = Callable[[Where, Any], tuple[str, Document] | None]
"""(place, row) -> (key, document), or None to leave the row out."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Table(abc.ABC):
    """Rows with named columns."""

    path: str
    """A file, a glob such as "c4/*.jsonl.gz", or an http(s) URL."""
    text: str = "text"
    """Column with the document."""

    @abc.abstractmethod
    def read(self, split: Split, of_row: OfRow[Document], columns: Sequence[str] | None = None) -> Iterator[Document]:
        """The documents that `of_row` makes of the rows of a split. Where a table is not divided into splits, a hash of
        the document's key decides.

        columns  names of the columns to read. None: all"""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, that changes when the rows may have changed."""

    def documents(self, split: Split) -> Iterator[str]:
        nulls = 0

        def of_row(where: Where, row: Json) -> tuple[str, str] | None:
            nonlocal nulls
            text = column(row, self.text, where, "text")
            if text is None:
                nulls += 1
                return None
            if not isinstance(text, str):
                raise UserError(f"text: {where}: got {type(text).__name__} in {self.text!r}, must be text")
            return (text, text) if text.strip() else None

        yield from self.read(split, of_row, [self.text])
        if nulls:
            log.warning("%s, %s: left out %d rows whose %r is null", self.path, split, nulls, self.text)


@dataclasses.dataclass(frozen=True)
class FileTable(Table):
    """A table in files that are not divided into splits."""

    validation: float = 0.1
    """Fraction of the documents held out for validation, chosen by a hash of the document. 0: none."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    @abc.abstractmethod
    def rows(self, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Where, Any]]:
        """Rows of one file, with their places."""

    def files(self) -> Iterator[tuple[Self, int]]:
        """A table of each file, in order, and the size of the file in bytes."""
        return one_each(self)

    def read(self, split: Split, of_row: OfRow[Document], columns: Sequence[str] | None = None) -> Iterator[Document]:
        rows = (row for path in find_files(self.path) for row in self.rows(path, columns))
        keyed = (document for row in rows if (document := of_row(*row)) is not None)
        return of_split(keyed, split, self.path, self.validation)

    def fingerprint(self) -> str:
        return fingerprint(self, *file_state(self.path))


@dataclasses.dataclass(frozen=True)
class Jsonl(FileTable):
    """JSON lines, one object per line, or a JSON array of objects. Files may be gzipped (.gz)."""

    invalid: Literal["error", "skip"] = "error"
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""

    def rows(self, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Where, Any]]:
        return read_json(path, self.invalid)


@dataclasses.dataclass(frozen=True)
class Csv(FileTable):
    """Comma- or tab-separated values (RFC 4180: fields with separators, quotes or line ends are quoted by "). Files may
    be gzipped (.gz)."""

    delimiter: str | None = None
    """Character between fields. None: a tab in .tsv files, else a comma."""
    columns: tuple[str, ...] = ()
    """Names of the columns, in files without a header. Empty: the first row has them."""
    invalid: Literal["error", "skip"] = "error"
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise UserError(f"delimiter: got {self.delimiter!r}, must be one character")

    def rows(self, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Where, Any]]:
        delimiter = self.delimiter or ("\t" if ".tsv" in path.suffixes else ",")
        csv.field_size_limit(sys.maxsize)  # the library's own is 128 KiB, less than many a document
        line = 0

        def lines() -> Iterator[str]:
            nonlocal line
            for line, text in read_lines(path, self.invalid):  # noqa: B007
                yield text

        reader, names = csv.reader(lines(), delimiter=delimiter, strict=True), self.columns
        start = 1
        try:
            for values in reader:
                where, start = Where(str(path), start), line + 1
                if not values:  # an empty line
                    continue
                if not names:
                    names = tuple(values)
                    if len(set(names)) < len(names):
                        raise UserError(f"path: {where}: got the columns {', '.join(names)}, must differ in name")
                    continue
                if len(values) != len(names):
                    raise UserError(
                        f"path: {where}: got {len(values)} fields, must be {len(names)}, as the columns "
                        f"{', '.join(names)}; quote fields that hold a {delimiter!r} or a line end"
                    )
                yield where, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise UserError(
                f"path: {path}:{start}: not CSV ({error}); must have fields in double quotes or without any"
            ) from None


@dataclasses.dataclass(frozen=True)
class Parquet(FileTable):
    """Parquet files, read by pyarrow one group of rows at a time."""

    def rows(self, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Where, Any]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError("path: Parquet files need the pyarrow library; pip install 'gptjax[hf]'") from None
        try:
            with parquet.ParquetFile(path) as file:
                for name in columns or ():
                    column(dict.fromkeys(file.schema_arrow.names), name, Where(str(path), 1), "text")
                row = 0
                for batch in file.iter_batches(batch_size=1024, columns=columns):
                    for row, value in enumerate(batch.to_pylist(), row + 1):  # noqa: B020
                        yield Where(str(path), row), without_nulls(value)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, which may recover
                raise
            raise UserError(
                f"path: {path}: not Parquet, or damaged ({one_line(error)}); copy or download it again"
            ) from None


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with the nulls inside its values left out. Arrow gives every object of a column the fields of all."""

    def clean(value: Json) -> Any:
        if isinstance(value, Mapping):
            return {name: clean(inner) for name, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return {name: clean(value) for name, value in row.items()}


def column(row: Json, name: str, where: Where, option: str) -> Any:
    """A row's value in a column. Raises UserError if it has no such column."""
    if not isinstance(row, Mapping):
        raise UserError(f'{option}: {where}: got {type(row).__name__}, must be an object with a text in "{name}"')
    if name not in row:
        raise UserError(
            f'{option}: {where}: got the fields {", ".join(row)}, must have a text in "{name}"; name the column with it'
        )
    return row[name]
