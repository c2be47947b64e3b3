"""A profile of some steps: what the host and every device did, moment by moment, for xprof, TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax


class Profile:
    """Traces the steps of a range; without one, none.

    wanted: counted from where the run begins or goes on
    folder: where to write; each of several processes has a folder of its own in it
    start:  steps done before
    say:    is told where the trace is and how to look at it
    """

    def __init__(self, wanted: range | None, folder: str | os.PathLike[str], start: int, say: Callable[[str], None]):
        self._wanted = range(start + wanted[0], start + wanted[-1] + 1) if wanted else range(0)
        self._folder = Path(folder) / (str(jax.process_index()) if jax.process_count() > 1 else "")
        self._say = say
        self._tracing = self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()
        elif self._wanted and not self._over:
            self._say(f"profile: nothing written, the run ended before step {self._wanted[0]}")

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Context in which the step of this number is begun."""
        if number in self._wanted and not self._tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of a Python function: slow, and megabytes a step
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def begun(self, number: int, metrics: Any) -> None:
        """That step has been begun, and these are its results: after the last one the trace is written."""
        if self._tracing and number == self._wanted[-1]:
            jax.block_until_ready(metrics)  # else the devices' last step would be cut off
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing, self._over = False, True
        self._say(
            f"profile: {self._folder}\n  look at it with: xprof --logdir {shlex.quote(str(self._folder))}\n"
            "  (pip install xprof), or drop the *.trace.json.gz in it on https://ui.perfetto.dev"
        )
