"""Profiles of some steps: a trace of the host and all devices for xprof, TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Self

import jax

from gptjax.types import PyTree


class Profile:
    """Trace a range of steps.

    steps:  counted from the step at which the run starts or resumes. None: no trace
    folder: destination; each process of a multi-process job writes to its own subfolder
    start:  steps done before
    report: called with the path of the trace and how to view it
    """

    def __init__(self, steps: range | None, folder: str | os.PathLike[str], start: int, report: Callable[[str], None]):
        self._steps = range(start + steps[0], start + steps[-1] + 1) if steps else range(0)
        self._folder = Path(folder) / (str(jax.process_index()) if jax.process_count() > 1 else "")
        self._report = report
        self._tracing = self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()
        elif self._steps and not self._over:
            self._report(f"profile: nothing written, the run ended before step {self._steps[0]}")

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Context in which to dispatch this step."""
        if number in self._steps and not self._tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing every Python call is slow, and megabytes per step
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def dispatched(self, number: int, metrics: PyTree) -> None:
        """Note that this step was dispatched, with these results. After the last step the trace is written."""
        if self._tracing and number == self._steps[-1]:
            jax.block_until_ready(metrics)  # else the devices' last step would be missing from the trace
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing, self._over = False, True
        self._report(
            f"profile: {self._folder}\n  view it with: xprof --logdir {shlex.quote(str(self._folder))}\n"
            "  (pip install xprof), or open its *.trace.json.gz on https://ui.perfetto.dev"
        )
