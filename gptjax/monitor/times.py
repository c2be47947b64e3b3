"""Breakdown of a training loop's time: device work, input, host, checkpoints, evaluation.

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
import resource
import sys
import time
from collections.abc import Mapping

import jax

from gptjax.monitor.chips import peak_flops
from gptjax.types import PyTree

TRAINING: tuple[str, ...] = ("input", "host", "device")
"""Parts of a training step."""
BESIDE: tuple[str, ...] = ("start", "rollouts", "checkpoint", "evaluation")
"""Parts outside the training steps."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of some steps, by part.

    start       waiting for the first batch, and compilation in the first step's call
    input       devices idle for lack of a batch
    host        devices idle for another reason
    device      devices computing, or waiting for those of other processes
    rollouts    writing and scoring replies to train on
    checkpoint  copying the state to the host, and waiting for the previous save
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
    """A stopwatch that assigns every moment to one part. step: steps done before; tokens and flops: see `Times`."""

    def __init__(self, step: int, tokens: int, flops: float):
        self._step, self._tokens, self._flops = step, tokens, flops
        self._parts = dict.fromkeys((*TRAINING, *BESIDE), 0.0)
        self._running: PyTree = None
        self._at, self._worked = time.perf_counter(), time.thread_time()

    def lap(self, part: str) -> None:
        """Assign the time since the last lap to this part, or to the devices if they are still busy."""
        self._parts["start" if self._running is None else "device" if self._busy() else part] += self._since()

    def dispatched(self, metrics: PyTree) -> None:
        """Note that a step was dispatched, with these results. The call's CPU time counts as host time; the rest of the
        call waited for the devices."""
        if self._running is None:
            self.lap("start")
        else:
            busy, worked = self._busy(), time.thread_time() - self._worked
            seconds = self._since()
            host = 0.0 if busy else min(worked, seconds)
            self._parts["host"] += host
            self._parts["device"] += seconds - host
        self._running = jax.tree.leaves(metrics)[0]

    def take(self, step: int) -> Times:
        """The times since the previous call, once the results of this step are fetched. Resets the parts."""
        times = Times(step - self._step, self._parts, self._tokens, self._flops)
        self._step, self._parts = step, dict.fromkeys(self._parts, 0.0)
        return times

    def _busy(self) -> bool:
        return self._running is not None and not self._running.is_ready()

    def _since(self) -> float:
        before, self._at, self._worked = self._at, time.perf_counter(), time.thread_time()
        return self._at - before


def memory() -> dict[str, int]:
    """Peak memory in bytes: memory_device, of this process's fullest device, if the backend reports it; memory_process,
    the host memory of this process."""
    counted = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    peaks = [stats["peak_bytes_in_use"] for stats in counted if "peak_bytes_in_use" in stats]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ({"memory_device": max(peaks)} if peaks else {}) | {"memory_process": used}
