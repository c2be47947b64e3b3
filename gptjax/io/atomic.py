"""Atomic writes: whatever happens to the writer, a reader finds a file or folder complete or not at all. And locks.

    with atomic.new("model.gguf") as partial:
        partial.write_bytes(...)

The new file or folder is written beside its place, synced to disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from gptjax.types import UserError

FULL_OR_READ_ONLY = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG
SUFFIX = ".partial"
"""Ending of names of files and folders that are being written."""
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def new(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """Path at which to write the file or folder that is renamed `path` when the block ends; on an error it is deleted.

    A file replaces one of the same name, a folder must not exist. What a killed process leaves, `partial_of(path)`, the
    next write deletes. An object in a bucket (gs://) is written in place, as it appears when it is closed.

    shared  several processes may write at once: each to a name of its own
    """
    if "://" in os.fspath(path):
        yield cast(Path, path)
        return
    path, partial = Path(path), partial_of(f"{path}.{secrets.token_hex(4)}" if shared else path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete(partial)
    try:
        yield partial
        for written in (*partial.rglob("*"), partial):
            _sync(written)
        partial.replace(path)
        _sync(path.parent)
    except BaseException:
        _delete(partial)
        raise


def move(path: Path, target: Path) -> None:
    """Move a file or folder to a path of the same file system, where there must be none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    for folder in {target.parent, path.parent}:
        _sync(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of UTF-8 text."""
    with new(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line of UTF-8 text to a file; it is on disk when this returns."""
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")
    _sync(Path(path))


def drop_partial_line(path: str | os.PathLike[str]) -> None:
    """Cut off the rest of a line that was being appended when its writer was killed."""
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], wait: bool = True) -> Iterator[None]:
    """Context in which no other process holds the lock of this file, which is created and stays. A process that ends,
    however it does, holds no lock. On a file system without locks there is a warning, and no protection.

    wait  wait for another process to release the lock; else raise BlockingIOError
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            _log.warning("%s: this file system has no locks (%s)", path, error.strerror)
        yield


@contextlib.contextmanager
def usable(folder: Path, field: str, fix: str) -> Iterator[None]:
    """Context in which a file of the folder that cannot be used, or a disk that is full or read-only, is a UserError
    that names this field and this way to mend it."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(error.filename).is_relative_to(folder)
        if not inside and error.errno not in FULL_OR_READ_ONLY:
            raise
        raise UserError(
            f"{field}: cannot use {error.filename or folder} ({error.strerror}); free some space, make it writable, "
            f"or {fix}"
        ) from error


def partial_of(path: str | os.PathLike[str]) -> Path:
    """Temporary path of `path` while it is being written."""
    path = Path(path)
    return path.with_name(path.name + SUFFIX)


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
