"""Where the time of a training loop goes: what the devices do, and what they wait for.

    clock = Clock(step=0, tokens=4096, flops=6 * parameters)
    for step, batch in enumerate(batches, 1):
        clock.lap("input")
        state, metrics = train_step(state, batch)
        clock.started(metrics)
        ...
        values = jax.device_get(metrics)
        clock.lap("device")
        times = clock.take(step)

Devices work behind the host's back: calling a step only begins it. So nobody times the devices, which would keep them
waiting; what is counted is how long the host kept them waiting. An interval at whose end they were still busy is
theirs, whatever the host did meanwhile; one at whose end they had run dry belongs to what the host did. The parts add
up to the time on the wall.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from gptjax.monitor.chips import peak_flops

TRAINING: tuple[str, ...] = ("input", "host", "device")
"""What a step consists of."""
BESIDE: tuple[str, ...] = ("start", "checkpoint", "evaluation")
"""What also takes time."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that some steps took, by part.

    start       the first batch, and compilation in the call of the first step
    input       the devices had no batch
    host        the devices had nothing to do, for another reason
    device      the devices worked, or waited for those of other processes
    checkpoint  the state was copied to the host, and the save before waited for
    evaluation  validation and samples
    """

    steps: int
    parts: Mapping[str, float]
    tokens: int
    """Of a step."""
    flops: float
    """Of the model, to train on one token."""

    @property
    def step(self) -> float:
        """Seconds of a step, without what happens beside it."""
        return max(sum(self.parts[part] for part in TRAINING), 1e-9) / self.steps

    @property
    def waiting(self) -> float:
        """The share of a step that the devices wait for input, from 0 to 1."""
        return self.parts["input"] / self.steps / self.step

    def values(self) -> dict[str, float]:
        """To record: time_step, and by part, all in seconds a step; tokens_per_second; mfu, the model-FLOPs utilisation
        from 0 to 1, where the devices' peak is known."""
        parts = [part for part in (*TRAINING, *BESIDE) if part in TRAINING or self.parts[part]]
        speed, peak = self.tokens / self.step, peak_flops(jax.devices()[0].device_kind)
        return (
            {"time_step": self.step}
            | {f"time_{part}": self.parts[part] / self.steps for part in parts}
            | {"tokens_per_second": speed}
            | ({"mfu": speed * self.flops / (peak * jax.device_count())} if peak else {})
        )


class Clock:
    """A stop watch of laps; every moment belongs to one part. step: done before; for the rest see `Times`."""

    def __init__(self, step: int, tokens: int, flops: float):
        self._step, self._tokens, self._flops = step, tokens, flops
        self._parts = dict.fromkeys((*TRAINING, *BESIDE), 0.0)
        self._running: Any = None
        self._at, self._worked = time.perf_counter(), time.thread_time()

    def lap(self, part: str) -> None:
        """What passed since the last lap is this part's, or the devices' if they are still at work."""
        self._parts["start" if self._running is None else "device" if self._busy() else part] += self._since()

    def started(self, metrics: Any) -> None:
        """A step has been begun, of which these are results. The call took the host's time as far as it computed; the
        rest of it waited for the devices."""
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
        """The times since the last call, when the results of this step have been fetched; begins anew."""
        times = Times(step - self._step, self._parts, self._tokens, self._flops)
        self._step, self._parts = step, dict.fromkeys(self._parts, 0.0)
        return times

    def _busy(self) -> bool:
        return self._running is not None and not self._running.is_ready()

    def _since(self) -> float:
        before, self._at, self._worked = self._at, time.perf_counter(), time.thread_time()
        return self._at - before


def memory() -> dict[str, int]:
    """The most bytes that were ever in use: memory_device, on the fullest of this process's devices, where the backend
    counts them; memory_process, by this process on its host."""
    counted = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    peaks = [stats["peak_bytes_in_use"] for stats in counted if "peak_bytes_in_use" in stats]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ({"memory_device": max(peaks)} if peaks else {}) | {"memory_process": used}
