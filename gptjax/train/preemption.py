"""Graceful stops: a signal is recorded, and checked after every step and every batch of an evaluation."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Stop flag, set by the first Ctrl-C or SIGTERM. A second Ctrl-C interrupts at once.

    In a multi-process job any process may get the signal, and all stop at the same step: jax's preemption service
    synchronises them. That service handles SIGTERM itself, so a Ctrl-C is forwarded to it as SIGTERM. All processes
    must call `now` equally often.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    is_set = False

    def now(self) -> bool:
        return self.is_set

    def __call__(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


_sync_points = itertools.count(1)  # for the whole process: jax's service needs increasing numbers


class _SynchronisedStopSignal(StopSignal):
    signals = (signal.SIGINT,)
    agreed = False  # jax returns True only once

    def now(self) -> bool:
        self.agreed = self.agreed or multihost_utils.reached_preemption_sync_point(next(_sync_points))
        return self.agreed

    def __call__(self, number: int, frame: Any) -> None:
        super().__call__(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def signals() -> Iterator[StopSignal]:
    """Context in which signals set the returned flag instead of interrupting."""
    stop = StopSignal() if jax.process_count() == 1 else _SynchronisedStopSignal()
    try:
        before = {number: signal.signal(number, stop) for number in stop.signals}
    except ValueError:  # not the main thread, which owns the signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
