"""Rows of a task's files, read once, with their places for error messages."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gptjax.data.files import Where, file_state, find_files, read_json, read_lines
from gptjax.types import UserError

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
