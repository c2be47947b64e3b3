"""Heartbeats of each process of a run, and a report of all threads when a step hangs.

    with Watchdog("runs/small", "pretrain", seconds=300) as watchdog:
        for step, batch in enumerate(batches):
            ...
            watchdog.beat(step)

runs/small/heartbeat/PROCESS.json holds this process's progress, a few seconds old. If a step hangs, the step and the
stacks of all threads are written to runs/small/hang/PROCESS.txt and standard error; no process is stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Self

import jax

from gptjax.io import atomic

EVERY = 5.0
"""Seconds between heartbeats."""
USUAL = 3
"""A step hangs if it takes this many times the longest step so far ..."""
PATIENCE = 6
"""... and this factor more is allowed for compilation, evaluation and checkpoints."""
STANDARD_ERROR = 2


class Watchdog:
    """Watch a training loop from a background thread; the loop itself only calls `beat`.

    folder:  the run folder
    stage:   name of the stage
    seconds: time limit of a step; slow steps have `USUAL` times the longest step so far, if that is more
    step:    steps done before
    """

    def __init__(self, folder: str | os.PathLike[str], stage: str, seconds: float, step: int = 0):
        self._name = str(jax.process_index())
        self._folder = Path(folder)
        self._stage = stage
        self._seconds = seconds
        self._host = socket.gethostname()
        self._figures: dict[str, float] = {}
        self._longest = 0.0
        self._last = step, time.monotonic(), True  # steps done, time of the last beat, True: not in a step
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        self._heartbeat()

    def beat(self, step: int, pause: bool = False) -> None:
        """Report progress. step: steps done; pause: something slower than a step comes before the next one."""
        now = time.monotonic()
        _, since, paused = self._last
        if not paused:
            self._longest = max(self._longest, now - since)
        self._last = step, now, pause

    def set_figures(self, figures: dict[str, float]) -> None:
        """Set further figures for the next heartbeats."""
        self._figures = figures

    def _watch(self) -> None:
        reported = None
        written = -EVERY
        while not self._end.wait(min(1.0, self._seconds / 4)):
            last = step, since, pause = self._last
            now = time.monotonic()
            limit = max(self._seconds, USUAL * self._longest) * (PATIENCE if pause else 1)
            if now - written >= EVERY:
                written = now
                self._heartbeat()
            if now - since > limit and reported != last:
                reported = last
                self._report(step, now - since)

    def _heartbeat(self) -> None:
        step, since, _ = self._last
        content = {
            "process": int(self._name),
            "host": self._host,
            "time": round(time.time(), 3),
            "stage": self._stage,
            "step": step,
            "since": round(time.monotonic() - since, 3),
            **self._figures,
        }
        path = self._folder / "heartbeat" / f"{self._name}.json"
        with contextlib.suppress(OSError):  # a failed heartbeat must not end a run
            atomic.write_text(path, json.dumps(content) + "\n")

    def _report(self, step: int, seconds: float) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        head = (
            f"{now}: process {self._name} on {self._host}: {self._stage} has not advanced beyond step {step} for "
            f"{seconds:.0f} s (the longest step took {self._longest:.3g} s). All threads:\n"
        )
        path = self._folder / "hang" / f"{self._name}.txt"
        os.write(STANDARD_ERROR, f"\n{head}".encode())
        faulthandler.dump_traceback(STANDARD_ERROR)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file)
                file.write("\n")
