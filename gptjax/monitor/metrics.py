"""Metrics of a run: always metrics.jsonl and TensorBoard files, Weights & Biases optionally.

    metrics = MetricsLogger("runs/small")
    metrics.resume("pretrain", 1000)  # the step of the restored checkpoint
    metrics.log(1001, "pretrain", loss=3.2, rate=3e-4)
    metrics.text(1001, "pretrain/sample", "Once upon a time")

The lines of runs/small/metrics.jsonl are

    {"step": 1001, "stage": "pretrain", "time": 1767225600.0, "loss": 3.2, "rate": 0.0003}

and runs/small/tensorboard/STAGE/ has the same values as curves. Log a step before its checkpoint is saved: then each
step is logged exactly once, whenever the run was stopped.
Damaged lines are moved to metrics.damaged.jsonl.

    metrics.wall.spend("input", 0.5)
    metrics.wall.account("start", "pretrain", 1001)

appends a line to runs/small/wall.jsonl, the wall time by part (`gptjax.monitor.times.WallTime`):

    {"time": 1767225600.0, "seconds": {"input": 0.5, "start": 12.0}, "stage": "pretrain", "step": 1001}
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import math
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, SupportsFloat

import jax

from gptjax.io import atomic
from gptjax.monitor.times import WallTime
from gptjax.types import UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WandB:
    """Log to Weights & Biases in addition to the files. A resumed run keeps its id."""

    project: str = "gptjax"
    """Project to log to."""
    entity: str | None = None
    """User or team. None: your default entity."""
    name: str | None = None
    """Name of the run. None: the name of its folder."""
    group: str | None = None
    """Group of runs to show together."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class MetricsLogger:
    """Write a run's metrics to `folder`. Only the first process of a job writes; on others every call does nothing.

    config: the resolved configuration, shown by Weights & Biases.
    started: when this process began with the run, in seconds since 1970. None: now.
    Raises UserError if `wandb` is given but not installed, and whenever the folder is not writable.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        wandb: WandB | None = None,
        config: dict | None = None,
        started: float | None = None,
    ):
        self.folder = Path(folder)
        self._writes = jax.process_index() == 0
        self._boards: dict[str, Any] = {}
        self._resumed: dict[str, int] = {}
        self._wandb = None
        if self._writes:
            self._path = self.folder / "metrics.jsonl"
            with _writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                _set_aside(self._path)
            self._wandb = _start_wandb(wandb, self.folder, config) if wandb else None
            with _writing(self.folder):
                self._file = self._path.open("ab", buffering=0)
        self.wall = WallTimeLog(self.folder, time.time() if started is None else started, self._writes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def resume(self, stage: str, step: int) -> None:
        """Resume a stage at this step: drop its later lines, which will be logged again."""
        if self._writes:
            with _writing(self.folder):
                self._file.close()
                _keep(self._path, lambda line: line["stage"] != stage or line["step"] <= step)
                self._file = self._path.open("ab", buffering=0)
                _keep_replies(self.folder / "rollouts" / f"{stage}.jsonl", step)
            self._resumed[stage] = step
            if stage in self._boards:
                self._boards.pop(stage).close()

    def log(self, step: int, stage: str, **values: SupportsFloat) -> None:
        """Log scalars (numbers or arrays of one element) of a step. Non-finite values become null in metrics.jsonl."""
        if self._writes:
            numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
            finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            with _writing(self.folder):
                self._write(step, stage, finite)
                for name, value in numbers.items():
                    self._board(stage).add_scalar(name, value, step)
            self._log_wandb(step, stage, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text of a step, such as a sample of the model, under the name "STAGE/NAME"."""
        if self._writes:
            stage, _, label = name.rpartition("/")
            with _writing(self.folder):
                self._write(step, stage, {label: text})
                self._board(stage).add_text(label, f"```\n{text}\n```", step)
            self._log_wandb(step, stage, {label: text})

    def replies(self, stage: str, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Append replies that this step's round was written from, of JSON types, to rollouts/STAGE.jsonl."""
        if self._writes:
            path = self.folder / "rollouts" / f"{stage}.jsonl"
            with _writing(self.folder):
                path.parent.mkdir(exist_ok=True)
                lines = [json.dumps({"train_step": step, **record}, allow_nan=False) for record in records]
                atomic.append_line(path, "\n".join(lines))

    def store(self) -> None:
        """Close and reopen the files: a bucket mounted as a folder stores a file only when it is closed."""
        if self._writes:
            with _writing(self.folder):
                self._file.close()
                self._file = self._path.open("ab", buffering=0)
        self.wall.store()

    def close(self) -> None:
        self.wall.close()
        if self._writes:
            self._file.close()
            for board in self._boards.values():
                board.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _write(self, step: int, stage: str, values: dict[str, Any]) -> None:
        line = {"step": int(step), "stage": stage, "time": round(time.time(), 3), **values}
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        if self._file.write(data) < len(data):  # unbuffered: one system call per line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _log_wandb(self, step: int, stage: str, values: dict[str, Any]) -> None:
        if self._wandb is not None:  # stages count their own steps, and W&B's counter cannot go back on a resume
            self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._wandb.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def _board(self, stage: str) -> Any:
        """The stage's TensorBoard writer. One folder per stage, because `purge_step` affects a whole folder."""
        if stage not in self._boards:
            from tensorboardX import SummaryWriter

            purge = self._resumed[stage] + 1 if stage in self._resumed else None
            folder = str(self.folder / "tensorboard" / stage)
            suffix = f".{time.time_ns()}"  # TensorBoard names files by the second: a quick resume would overwrite one
            self._boards[stage] = SummaryWriter(folder, purge_step=purge, flush_secs=10, filename_suffix=suffix)
        return self._boards[stage]


class WallTimeLog:
    """Write a run's wall time by part to `folder`/wall.jsonl, as lines for `WallTime`.

    started: when this process began with the run, in seconds since 1970
    writes:  False: every call does nothing, as on all processes of a job but the first
    """

    def __init__(self, folder: Path, started: float, writes: bool = True):
        self._folder, self._path, self._started, self._writes = folder, folder / "wall.jsonl", started, writes
        self._wall, self._spent = WallTime(read_wall(folder) if writes else ()), defaultdict[str, float](float)
        self._at = time.perf_counter() - max(time.time() - started, 0.0)
        self._file: io.FileIO | None = None
        self._before, self._open = self._seconds_before(), False

    def spend(self, part: str, seconds: float) -> None:
        """Note that so much of the time since the last line was of this part."""
        self._spent[part] += seconds

    def lap(self, part: str) -> None:
        """Assign to this part all time since the last line that was not assigned yet."""
        seconds = time.perf_counter() - self._at - sum(self._spent.values())
        self._spent[part] += max(seconds, 0.0)

    def account(
        self, rest: str, stage: str | None = None, step: int | None = None, *, ended: bool = False
    ) -> dict[str, float]:
        """Write a line, with the steps of a stage that are done. Returns the goodput so far, 0 to 1, as a metric.

        rest: part of the time since the last line that was not `spend`'s"""
        if not self._writes:
            return {}
        if not self._open:
            with contextlib.suppress(FileNotFoundError):
                atomic.drop_partial_line(self._path)
            self._write({"time": self._started, "seconds": self._before})
            self._open = True
        self.lap(rest)
        line = {"time": time.time(), "seconds": {part: s for part, s in self._spent.items() if s >= 1e-6}}
        self._at, self._spent = self._at + sum(self._spent.values()), defaultdict(float)
        line |= {} if stage is None else {"stage": stage, "step": step}
        self._write(line | ({"ended": True} if ended else {}))
        self._open = not ended
        return {"goodput": self._wall.goodput}

    def end(self, rest: str) -> None:
        """Write the last line of a run that is at its end, unless nothing was done: until it is extended, the time is
        nobody's."""
        if self._open:
            self.account(rest, ended=True)

    def store(self) -> None:
        """Close the file until the next line."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file. The time since the last line is lost, unless the run is at its end."""
        if self._open:
            with contextlib.suppress(UserError):  # another error is on its way
                self.account("lost")
        self.store()

    def _seconds_before(self) -> dict[str, float]:
        """Seconds from the last line to the start of this process, of a run that is not at its end."""
        last = self._wall.last
        if last is None or last.get("ended"):
            return {}
        alive = last["time"]
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            beat = json.loads((self._folder / "heartbeat" / "0.json").read_bytes())
            alive = max(alive, min(float(beat["time"]), self._started))
        return {"lost": alive - last["time"], "down": max(self._started - alive, 0.0)}

    def _write(self, line: dict[str, Any]) -> None:
        line["time"] = round(line["time"], 3)
        line["seconds"] = {part: round(seconds, 6) for part, seconds in line["seconds"].items()}
        with _writing(self._folder):
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            self._file.write(json.dumps(line).encode() + b"\n")
        self._wall.add(line)


def read_wall(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Sound lines of a run's wall.jsonl, in the order of writing. A warning tells of others."""
    path, found = Path(folder) / "wall.jsonl", []
    lines = _lines(path)
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
            values = json.loads(line)
            WallTime([{**values, "time": float(values["time"])}])  # raises an error for what is no line of it
            found.append(values)
    if damaged := len(lines) - len(found):
        _log.warning("%s: damaged in %d lines, whose time is not counted", path, damaged)
    return found


def read(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Sound lines of a run's metrics.jsonl, in the order of writing."""
    return [line for line in map(_parse, _lines(Path(folder) / "metrics.jsonl")) if line is not None]


def last_losses(folder: str | os.PathLike[str], stage: str) -> tuple[list[tuple[int, float]], float | None]:
    """The last training losses of a stage, with their steps, and its last validation loss."""
    lines = [line for line in read(folder) if line["stage"] == stage]
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validation = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return losses[-100:], validation[-1] if validation else None


def _lines(path: Path) -> list[bytes]:
    """Lines of a file, without their ends. A last line without an end, left by a kill, is none."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _parse(line: bytes) -> dict[str, Any] | None:
    """The values of a line. None: damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(values, dict) and isinstance(values.get("step"), int) and isinstance(values.get("stage"), str)
    return values if sound and all(isinstance(x, str | int | float | None) for x in values.values()) else None


def _set_aside(path: Path) -> None:
    """Move damaged lines to a file of their own, with a warning that names them."""
    lines = _lines(path)
    damaged = [number for number, line in enumerate(lines, 1) if _parse(line) is None]
    if damaged:
        aside = path.with_name("metrics.damaged.jsonl")
        with aside.open("ab") as file:
            file.writelines(lines[number - 1] + b"\n" for number in damaged)
        named = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        _log.warning("%s: damaged in %d lines (%s), which are now in %s", path, len(damaged), named, aside)
    _keep(path, lambda _: True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"metrics: cannot write to {folder} ({reason}); free some space or make it writable") from error


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file atomically with its sound lines that are `wanted`."""
    if path.exists():
        atomic.write_text(path, "".join(f"{json.dumps(line)}\n" for line in read(path.parent) if wanted(line)))


def _keep_replies(path: Path, step: int) -> None:
    """Rewrite the file of replies with those of the steps up to this one."""
    if path.exists():
        kept = [line for line in _lines(path) if json.loads(line)["train_step"] <= step]
        atomic.write_text(path, "".join(f"{line.decode()}\n" for line in kept))


def _start_wandb(config: WandB, folder: Path, run_config: dict | None) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("wandb: got WandB(...), but it is not installed; pip install 'gptjax[wandb]'") from error
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    return wandb.init(
        project=config.project,
        entity=config.entity,
        name=config.name or folder.resolve().name,
        group=config.group,
        tags=list(config.tags),
        config=run_config,
        id=identity.read_text(),
        resume="allow",
        dir=str(folder),
    )
