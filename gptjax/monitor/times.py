"""Breakdown of a training loop's time: device work, input, host, checkpoints, evaluation; and of a run's wall time.

    clock = Clock(step=0, tokens=4096, flops=6 * parameters)
    for step, batch in enumerate(batches, 1):
        clock.lap("input")
        state, metrics = train_step(state, batch)
        clock.dispatched(metrics)
        ...
        values = jax.device_get(metrics)
        clock.lap("device")
        times = clock.take(step)

Devices run asynchronously: calling a step only dispatches it. We never block to time a step. If the device is still
busy when an interval ends, the interval counts as device time, else as the host's activity in it. The parts add up to
the wall-clock time.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from gptjax.monitor.chips import peak_flops
from gptjax.types import PyTree

TRAINING: tuple[str, ...] = ("input", "host", "device")
"""Parts of a training step."""
BESIDE: tuple[str, ...] = ("start", "rollouts", "checkpoint", "local_checkpoint", "evaluation")
"""Parts outside the training steps."""
USEFUL: tuple[str, ...] = ("device", "host", "rollouts")
"""Parts of a step that are useful if the step counts in the result."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of some steps, by part.

    start       waiting for the first batch, and compilation in the first step's call
    input       devices idle for lack of a batch
    host        devices idle for another reason
    device      devices computing, or waiting for those of other processes
    rollouts    writing and scoring replies to train on
    checkpoint  copying the state to the host, and waiting for the previous save
    local_checkpoint  the same, of a local checkpoint
    evaluation  validation and samples
    """

    steps: int
    parts: Mapping[str, float]
    tokens: int
    """Tokens per step."""
    flops: float
    """Training FLOPs per token."""

    @property
    def step(self) -> float:
        """Seconds per training step."""
        return max(sum(self.parts[part] for part in TRAINING), 1e-9) / self.steps

    @property
    def waiting(self) -> float:
        """Fraction of a step that the devices wait for input, from 0 to 1."""
        return self.parts["input"] / self.steps / self.step

    def values(self) -> dict[str, float]:
        """Metrics: time_step and the time of each part, in seconds per step; tokens_per_second; mfu, the model-FLOPs
        utilisation from 0 to 1, if the devices' peak is known."""
        parts = [part for part in (*TRAINING, *BESIDE) if part in TRAINING or self.parts[part]]
        speed, peak = self.tokens / self.step, peak_flops(jax.devices()[0].device_kind)
        return (
            {"time_step": self.step}
            | {f"time_{part}": self.parts[part] / self.steps for part in parts}
            | {"tokens_per_second": speed}
            | ({"mfu": speed * self.flops / (peak * jax.device_count())} if peak else {})
        )


class Clock:
    """A stopwatch that assigns every moment to one part. step: steps done before; tokens and flops: see `Times`;
    spend: called with every part and its seconds."""

    def __init__(
        self, step: int, tokens: int, flops: float, spend: Callable[[str, float], None] = lambda part, seconds: None
    ):
        self._step, self._tokens, self._flops, self._spend = step, tokens, flops, spend
        self._parts = dict.fromkeys((*TRAINING, *BESIDE), 0.0)
        self._running: PyTree = None
        self._at, self._worked = time.perf_counter(), time.thread_time()

    def lap(self, part: str) -> None:
        """Assign the time since the last lap to this part, or to the devices if they are still busy."""
        self._add("start" if self._running is None else "device" if self._busy() else part, self._since())

    def dispatched(self, metrics: PyTree) -> None:
        """Note that a step was dispatched, with these results. The call's CPU time counts as host time; the rest of the
        call waited for the devices."""
        if self._running is None:
            self.lap("start")
        else:
            busy, worked = self._busy(), time.thread_time() - self._worked
            seconds = self._since()
            host = 0.0 if busy else min(worked, seconds)
            self._add("host", host)
            self._add("device", seconds - host)
        self._running = jax.tree.leaves(metrics)[0]

    def take(self, step: int) -> Times:
        """The times since the previous call, once the results of this step are fetched. Resets the parts."""
        times = Times(step - self._step, self._parts, self._tokens, self._flops)
        self._step, self._parts = step, dict.fromkeys(self._parts, 0.0)
        return times

    def restart(self, step: int) -> None:
        """Discard the times since the last `take`, and the time since the last lap: this step comes again."""
        self.take(step)
        self._since()

    def _add(self, part: str, seconds: float) -> None:
        self._parts[part] += seconds
        self._spend(part, seconds)

    def _busy(self) -> bool:
        return self._running is not None and not self._running.is_ready()

    def _since(self) -> float:
        before, self._at, self._worked = self._at, time.perf_counter(), time.thread_time()
        return self._at - before


class WallTime:
    """Wall time of a run by part, of all its processes and between them, from the lines of wall.jsonl.

        wall = WallTime()
        wall.add({"time": 1767225600.0, "seconds": {}})
        wall.add({"time": 1767225610.0, "seconds": {"device": 9.0, "input": 1.0}, "stage": "pretrain", "step": 10})
        wall.goodput  # 0.9

    A line has the time, the seconds since the line before it, by part, and the steps of a stage that are done then. If
    these are fewer than before, as after a kill, the steps beyond them are lost. Beside the parts of `Times`:

    steps    device, host and rollouts, of the steps that count in the result
    lost     the same, of steps that were repeated or rolled back; and what a process that was killed did last
    restore  restoring a checkpoint
    commit   waiting until the last checkpoint of a stage is written
    down     no process was running, or one was starting
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()):
        self.parts: defaultdict[str, float] = defaultdict(float)  # seconds
        self.counts: Counter[str] = Counter()
        """Number of lines with each part: of checkpoints, and of interruptions (`down`)."""
        self.last: Mapping[str, Any] | None = None
        self._done: dict[str | None, int] = {}
        self._steps: dict[str | None, list[tuple[int, int, float]]] = {}  # first and last step, and seconds
        for line in lines:
            self.add(line)

    @property
    def total(self) -> float:
        """Seconds of all parts: the wall time, but for that after the end of a run that was then extended."""
        return sum(self.parts.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time, 0 to 1, in steps that count in the result."""
        return self.parts["steps"] / max(self.total, 1e-9)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add the next line."""
        self.last, seconds = line, dict(line["seconds"])
        self.counts.update(seconds.keys())
        useful = sum(seconds.pop(part, 0.0) for part in USEFUL)
        for part, spent in seconds.items():
            self.parts[part] += spent
        stage, step = line.get("stage"), line.get("step", -1)
        steps, before = self._steps.setdefault(stage, []), self._done.get(stage, 0)
        if step < before:
            self.parts["lost"] += useful
        else:
            self.parts["steps"] += useful
            steps.append((before, step, useful))
        while steps and steps[-1][1] > step:
            first, last, spent = steps.pop()
            kept = spent * max(step - first, 0) / max(last - first, 1)
            if kept:
                steps.append((first, step, kept))
            self.parts["steps"] -= spent - kept
            self.parts["lost"] += spent - kept
        if stage is not None:
            self._done[stage] = step


def save_interval(cost: float, failure: float) -> float:
    """Seconds of training between checkpoints that lose the least time: sqrt(2 cost failure) (Young 1974, "A first
    order approximation to the optimum checkpoint interval"; Daly 2006).

    cost     seconds that a checkpoint blocks training
    failure  mean time between failures, in seconds, much longer than `cost`"""
    return math.sqrt(2 * cost * failure)


def duration(seconds: float) -> str:
    """A time to read: 2.5 s, 1.2 min, 3.4 h, 5.6 d."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def memory() -> dict[str, int]:
    """Peak memory in bytes: memory_device, of this process's fullest device, if the backend reports it; memory_process,
    the host memory of this process."""
    counted = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    peaks = [stats["peak_bytes_in_use"] for stats in counted if "peak_bytes_in_use" in stats]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ({"memory_device": max(peaks)} if peaks else {}) | {"memory_process": used}
