"""Rows of a task's files, read once, with their places for error messages."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptjax.data.files import Where, file_state, find_files, read_json, read_lines
from gptjax.types import Json, UserError

Item = TypeVar("Item")


def read_items(path: str, item: Callable[[Where, Any], Item]) -> tuple[Item, ...]:
    """Items of all rows of a file of JSON, JSON lines or CSV, of a glob or of a URL.

    item  (place, row) -> item, a function at the top level of a module

    Raises UserError, with file and line, for a row that `item` cannot read."""
    return _read(path, item, json.dumps(file_state(path)))


@functools.lru_cache(maxsize=64)
def _read(path: str, item: Callable[[Where, Any], Item], state: str) -> tuple[Item, ...]:
    found = []
    for file in find_files(path):
        for where, row in _csv(file) if ".csv" in file.suffixes else read_json(file):
            try:
                found.append(item(where, row))
            except UserError as error:
                raise UserError(f"path: {where}: {error}") from None
    if not found:
        raise UserError(f"path: got {path}, which has no rows, must have at least one")
    return tuple(found)


def _csv(path: Path):
    """Rows of a file without a header, as lists: MMLU's form."""
    for row, values in enumerate(csv.reader(line for _, line in read_lines(path)), 1):
        if values:
            yield Where(str(path), row), values


def field(row: Json, *names: str, kind: type | tuple[type, ...] = str) -> Any:
    """A row's value in the first of these fields that it has. Raises UserError if it has none, or of another type."""
    if not isinstance(row, Mapping):
        raise UserError(f"got {type(row).__name__}, must be an object with {' or '.join(map(repr, names))}")
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
                wanted = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
                raise UserError(f"{name}: got {str(value)[:80]!r} ({type(value).__name__}), must be {wanted}")
            return value
    raise UserError(f"got the fields {', '.join(map(str, row))}, must have {' or '.join(map(repr, names))}")
