"""A copy of a run folder in a bucket, kept up behind the training: local checkpoints are fast, the bucket's outlive the
machine.

    with Mirror("gs://bucket/small", "runs/small"):
        experiment.run("runs/small")

What the bucket has and the folder has not is brought back first. A checkpoint's manifest is copied last, so that a copy
that was cut short is seen to be unfinished, as one on disk is.
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
from gptjax.types import UserError, one_line

CHECKPOINTS = "checkpoints"
_log = logging.getLogger(__name__)


class Mirror:
    """Copies `folder` to `address`, gs:// or a path, every `period` seconds while entered, and once more at the end.

    An error is warned of and tried again, after 1, 2, 4, ... seconds, at most `patience`; it never holds up a step.
    Leaving raises UserError if `attempts` in a row have failed then. Of several processes the first alone copies.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        period: float = 15.0,
        patience: float = 60.0,
        attempts: int = 5,
    ):
        self.there = epath.Path(address)
        self.here = epath.Path(folder)
        self.period = period
        self.patience = patience
        self.attempts = attempts
        self._copied: dict[str, tuple[int, int]] = {}
        self._begun: set[epath.Path] = set()  # checkpoints that were here when it was entered
        self._end = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._fetch()
            self._begun = {path for stage in _folders(self.here / CHECKPOINTS) for path in _checkpoints(stage)}
            self._thread.start()
        processes.meet("the mirror is fetched")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if jax.process_index() == 0:
            self._finish(kind)
        if kind is None or issubclass(kind, KeyboardInterrupt):
            processes.meet("the mirror is complete")

    def _finish(self, kind: type[BaseException] | None) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None:
            message = (
                f"mirror: {self.there} is not up to date ({one_line(self._error)}); "
                f"{self.here} is whole: run the same command again, or copy it"
            )
            if kind is not None:  # which says more
                _log.error(message)
            else:
                raise UserError(message) from self._error

    def _follow(self) -> None:
        """Runs on our thread."""
        failures = 0
        while True:
            ending = self._end.is_set()
            try:
                self._copy()
                failures, self._error = 0, None
            except Exception as error:  # each file system has its own
                failures, self._error = failures + 1, error
                _log.warning("mirror: %s is not up to date: %s; trying again", self.there, one_line(error))
            if ending and (not failures or failures >= self.attempts):
                return
            pause = min(2.0 ** (failures - 1), self.patience) if failures else self.period
            if ending:
                threading.Event().wait(pause)
            elif self._end.wait(pause):
                failures = 0  # the last tries are counted anew

    def _copy(self) -> None:
        """One round: small files that changed, new checkpoints, then deletions. Until a new one is copied, nothing is
        deleted: a folder just fetched has the newest checkpoint alone, and the older ones there are all that is left if
        that turns out to be bad."""
        for name in _names(self.here):
            status = os.stat(self.here / name)
            if self._copied.get(name) != (version := (status.st_size, status.st_mtime_ns)):
                _copy(self.here / name, self.there / name)
                self._copied[name] = version
        for stage in _folders(self.here / CHECKPOINTS):
            target = self.there / CHECKPOINTS / stage.name
            kept = [path for path in _checkpoints(stage) if self._save(path, target / path.name)]
            for old in _folders(target) if not self._begun.issuperset(kept) else ():
                if not (
                    stage / old.name / manifest.NAME
                ).exists():  # deleted, or cut short there and never written again
                    manifest.delete(old)

    def _save(self, source: epath.Path, target: epath.Path) -> bool:
        """Copy a checkpoint, if it is not there. False when it was deleted here meanwhile."""
        try:
            said = (source / manifest.NAME).read_text()
            if manifest.finished(target) and (target / manifest.NAME).read_text() == said:
                return True
            here, there = manifest.read(source), manifest.read(target)
            if here is not None and there is not None and here["files"] == there["files"]:
                _copy(source / manifest.NAME, target / manifest.NAME)  # its loss is known now
                return True
            if target.exists():
                manifest.delete(target)  # cut short, or of a future that was written anew
            _copy_checkpoint(source, target)
        except FileNotFoundError:
            if manifest.finished(source):
                raise
            return False
        return True

    def _fetch(self) -> None:
        """Bring back what is there and newer than what is here."""
        try:
            there = (self.there / "config.json").exists()
        except Exception as error:  # each file system has its own
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
        """Bring back the newest sound checkpoint of a stage, unless one as new is sound here."""
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
    """The name of every file but those of checkpoints and those that are still being written."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        name = prefix + path.name
        if name == CHECKPOINTS or path.name.endswith(".partial"):
            continue
        if path.is_dir():
            yield from _names(path, f"{name}/")
        else:
            yield name


def _copy_checkpoint(source: epath.Path, target: epath.Path) -> None:
    """The files that the manifest names, and then the manifest."""
    content = manifest.read(source)
    if content is None:
        raise OSError(f"{source / manifest.NAME} is not as it was written")
    for name in (*content["files"], manifest.NAME):
        _copy(source / name, target / name)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """A file, in pieces, whole or not at all: a bucket's file is there when it is closed, a local one is renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    bucket = "://" in os.fspath(target)
    written = target if bucket else target.with_name(f"{target.name}.partial")
    with source.open("rb") as reading, written.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 22)
    if not bucket:
        written.replace(target)
