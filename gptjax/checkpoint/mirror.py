"""A copy of a run folder in a bucket, updated in the background: local checkpoints are fast, the bucket's outlive the
machine.

    experiment.run("runs/small", mirror="gs://bucket/small")

Files that the bucket has and the folder lacks are copied back first. A checkpoint's manifest is copied last, so that an
interrupted copy counts as unfinished, as on disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Self

import jax
from etils import epath  # pathlib that also knows gs://

from gptjax.checkpoint import manifest
from gptjax.distributed import processes
from gptjax.io import atomic, retry
from gptjax.types import UserError, one_line

CHECKPOINTS = "checkpoints"
_log = logging.getLogger(__name__)


class Mirror:
    """Context that copies `folder` to `address`, gs:// or a path, every `period` seconds, and once more at the end.

    After an error it logs a warning and retries, with the pauses of `gptjax.io.retry`; training never waits. On exit it
    raises UserError after `retry.ATTEMPTS` consecutive failures. Only the first process copies.
    """

    def __init__(self, address: str | os.PathLike[str], folder: str | os.PathLike[str], period: float = 15.0):
        self.there = epath.Path(address)
        self.here = epath.Path(folder)
        self.period = period
        self._copied: dict[str, tuple[int, int]] = {}
        self._initial: set[epath.Path] = set()  # local checkpoints on entry
        self._end = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._fetch()
            self._initial = {path for stage in _folders(self.here / CHECKPOINTS) for path in _checkpoints(stage)}
            self._thread.start()
        processes.barrier("the mirror is fetched")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if jax.process_index() == 0:
            self._finish(kind)
        if kind is None or issubclass(kind, KeyboardInterrupt):
            processes.barrier("the mirror is complete")

    def _finish(self, kind: type[BaseException] | None) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None:
            message = (
                f"mirror: {self.there} is not up to date ({one_line(self._error)}); "
                f"{self.here} is complete: run the same command again, or copy it"
            )
            if kind is not None:  # the exception in flight says more
                _log.error(message)
            else:
                raise UserError(message) from self._error

    def _follow(self) -> None:
        """Copy periodically until the end. Runs on the background thread."""
        failures = 0
        while True:
            ending = self._end.is_set()
            try:
                self._copy()
                failures, self._error = 0, None
            except Exception as error:  # every file system has its own exceptions
                failures, self._error = failures + 1, error
                _log.warning("mirror: %s is not up to date: %s; trying again", self.there, one_line(error))
            if ending and (not failures or failures >= retry.ATTEMPTS):
                return
            pause = retry.pause(failures) if failures else self.period
            if ending:
                threading.Event().wait(pause)
            elif self._end.wait(pause):
                failures = 0  # count the final attempts anew

    def _copy(self) -> None:
        """One round: changed small files, new checkpoints, then deletions.

        Nothing is deleted before a new checkpoint is copied: a fetched folder has only the newest checkpoint, and if
        that proves bad, the older ones in the bucket are the only others."""
        for name in _names(self.here):
            status = os.stat(self.here / name)
            if self._copied.get(name) != (version := (status.st_size, status.st_mtime_ns)):
                _copy(self.here / name, self.there / name)
                self._copied[name] = version
        for stage in _folders(self.here / CHECKPOINTS):
            target = self.there / CHECKPOINTS / stage.name
            kept = [path for path in _checkpoints(stage) if self._save(path, target / path.name)]
            for old in _folders(target) if not self._initial.issuperset(kept) else ():
                # Deleted here, or an interrupted copy of a step that was never saved again.
                if not (stage / old.name / manifest.NAME).exists():
                    manifest.delete(old)

    def _save(self, source: epath.Path, target: epath.Path) -> bool:
        """Copy a checkpoint if the bucket lacks it. False if it was deleted here meanwhile."""
        try:
            text = (source / manifest.NAME).read_text()
            if manifest.finished(target) and (target / manifest.NAME).read_text() == text:
                return True
            here, there = manifest.read(source), manifest.read(target)
            if here is not None and there is not None and here["files"] == there["files"]:
                _copy(source / manifest.NAME, target / manifest.NAME)  # its loss is now known
                return True
            if target.exists():
                manifest.delete(target)  # interrupted, or of a step that was trained again
            _copy_checkpoint(source, target)
        except FileNotFoundError:
            if manifest.finished(source):
                raise
            return False
        return True

    def _fetch(self) -> None:
        """Copy back the run folder if the bucket's is newer."""
        try:
            there = (self.there / "config.json").exists()
        except Exception as error:  # every file system has its own exceptions
            raise UserError(
                f"mirror: {self.there} cannot be reached ({one_line(error)}); for gs:// pip install 'gptjax[gcs]'"
            ) from error
        if not there:
            return
        config = self.here / "config.json"
        if config.exists() and config.read_text() != (self.there / "config.json").read_text():
            raise UserError(f"mirror: {self.there} holds another run than {self.here}; choose another one")
        newer = not config.exists()
        for stage in _folders(self.there / CHECKPOINTS):
            newer |= self._fetch_newest(stage, self.here / CHECKPOINTS / stage.name)
        if newer:
            for name in _names(self.there):
                _copy(self.there / name, self.here / name)

    def _fetch_newest(self, source: epath.Path, target: epath.Path) -> bool:
        """Copy back the newest sound checkpoint of a stage, unless one as new is sound here. True if one was copied."""
        sound = next((int(path.name) for path in _checkpoints(target) if manifest.fault(path) is None), -1)
        for path in _checkpoints(source):
            if int(path.name) <= sound:
                return False
            if (target / path.name).exists():
                manifest.delete(target / path.name)  # damaged or unfinished
            if manifest.read(path) is not None:
                _copy_checkpoint(path, target / path.name)
            if (fault := manifest.fault(target / path.name)) is None:
                return True
            _log.warning("mirror: %s: %s; it is not used", path, fault)
            if (target / path.name).exists():
                manifest.delete(target / path.name)
        return False


def _checkpoints(stage: epath.Path) -> list[epath.Path]:
    """The finished checkpoints of a stage, newest first."""
    found = [path for path in _folders(stage) if path.name.isdecimal() and manifest.finished(path)]
    return sorted(found, key=lambda path: -int(path.name))


def _folders(folder: epath.Path) -> list[epath.Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of all files except checkpoints, locks and files still being written."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        name = prefix + path.name
        if name == CHECKPOINTS or path.name.endswith((atomic.SUFFIX, ".lock")):
            continue
        if path.is_dir():
            yield from _names(path, f"{name}/")
        else:
            yield name


def _copy_checkpoint(source: epath.Path, target: epath.Path) -> None:
    """Copy the files that the manifest names, then the manifest."""
    content = manifest.read(source)
    if content is None:
        raise OSError(f"{source / manifest.NAME} is not as it was written")
    for name in (*content["files"], manifest.NAME):
        _copy(source / name, target / name)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copy a file atomically, in chunks: a bucket's file appears when it is closed, a local one is renamed."""
    with source.open("rb") as reading, atomic.new(target) as partial, partial.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 22)
