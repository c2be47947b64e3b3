"""File of the scored replies of an evaluation, which is resumed from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from gptjax.types import UserError

Record = dict[str, Any]
"""A scored reply, of JSON types: item, sample, cluster, prompt, reply, outcome, value, parts, status, ..."""


class ReplyFile:
    """File of scored replies: a line with what they are of, then one of each reply.

    path  None: nothing is kept
    of    signature and model"""

    def __init__(self, path: Path | None, of: dict[str, str]):
        self._path, self._of = path, of
        self._file: IO[str] | None = None

    def read(self) -> list[Record]:
        """Replies so far. Raises UserError if the file is of something else. A line that was cut off is removed."""
        if self._path is None:
            return []
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._of) + "\n")
            return []
        try:
            first, *records = map(json.loads, whole.decode().splitlines())
        except ValueError as error:
            raise UserError(f"out: {self._path} is damaged ({error}); move it away to begin again") from None
        if first != self._of:
            raise UserError(f"out: {self._path} is of {first}, not of {self._of}; choose another folder")
        if len(whole) < len(content):
            self._path.write_bytes(whole)
        return records

    def add(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __enter__(self) -> None:
        if self._path is not None:
            self._file = self._path.open("a")

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
