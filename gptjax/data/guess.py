"""Kind of data in a file, recognised from its name and first row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.data.chat import Chat
from gptjax.data.classify import Classify
from gptjax.data.conversations import FORMATS, ChatJsonl, Conversations
from gptjax.data.dataset import Dataset, Pretrain
from gptjax.data.files import find_files, read_json
from gptjax.data.pairs import Pairs, PairsJsonl
from gptjax.data.sources import LabelledJsonl, Text
from gptjax.data.tables import Csv, FileTable, Jsonl, Parquet
from gptjax.types import UserError

TABLES: dict[str, type[FileTable]] = {
    ".jsonl": Jsonl,
    ".json": Jsonl,
    ".csv": Csv,
    ".tsv": Csv,
    ".parquet": Parquet,
}
"""Ending of a file's name -> its table. Files with another are plain text."""


def dataset_of(path: str) -> Dataset:
    """Data set of a file or glob, with nothing held out: conversations, pairs ("source" and "target"), labelled texts
    ("text" and "label"), else texts. Raises UserError for a table without these fields."""
    first = find_files(path)[0]
    suffixes = [suffix for suffix in first.suffixes if suffix != ".gz"][-1:]
    kind = TABLES.get(suffixes[0] if suffixes else "")
    if kind is None:
        return Pretrain(Text(path, validation=0.0))
    table = kind(path, validation=0.0)
    _, row = next(iter(table.rows(first, None)), (None, None))
    if row is None:
        raise UserError(f"path: got {first}, which has no rows; must have at least one")
    if any(format.recognises(row) for format in FORMATS):
        return Chat(ChatJsonl(path, validation=0.0) if kind is Jsonl else Conversations(table))
    fields = row.keys() if isinstance(row, Mapping) else set()
    if kind is Jsonl and {"source", "target"} <= fields:
        return Pairs(PairsJsonl(path, validation=0.0))
    if kind is Jsonl and {"text", "label"} <= fields:
        return Classify(LabelledJsonl(path, _labels(path), validation=0.0))
    if "text" in fields:
        return Pretrain(table)
    found = f"the fields {', '.join(map(str, fields))}" if fields else type(row).__name__
    raise UserError(
        f'path: got {first} with {found}, must have "text", "messages", "conversations", "instruction" and "output", '
        'or "source" and "target"; for other names give an experiment'
    )


def _labels(path: str) -> tuple[Any, ...]:
    """Labels of all rows, in order."""
    rows = (row for file in find_files(path) for _, row in read_json(Path(file)))
    return tuple(sorted({row.get("label") for row in rows if isinstance(row, Mapping)}, key=str))
