"""Audit log: who asked when, for which model, and how much; never a word of what was said.

{"time": "2026-01-31T12:00:00.000+00:00", "request": "5f0c1e...", "key": "alice", "address": "10.0.0.7",
 "method": "POST", "path": "/v1/chat/completions", "model": "quickstart", "status": 200, "prompt_tokens": 21,
 "completion_tokens": 90, "seconds": 1.234}
"""

from __future__ import annotations

import io
import json
import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path

from gptjax.types import Json, UserError

SIZE, FILES = 100 * 2**20, 10
"""Bytes after which a new file is begun, and number of files before it that are kept, as FILE.1 to FILE.10."""
_log = logging.getLogger(__name__)


class AuditLog:
    """A file of JSON lines that its owner alone may read. Raises UserError if it cannot be written."""

    def __init__(self, file: Path, size: int = SIZE, files: int = FILES):
        try:
            self._handler = _Private(file, maxBytes=size, backupCount=files, encoding="utf-8")
        except OSError as error:
            raise UserError(f"audit: got {file}, which cannot be written ({error.strerror})") from None

    def write(self, **fields: Json) -> None:
        """Append a line."""
        line = json.dumps(fields)
        self._handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _Private(RotatingFileHandler):
    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600))

    def handleError(self, record: logging.LogRecord) -> None:
        _log.error("audit: a line cannot be written, and is lost: %s", record.getMessage(), exc_info=True)
