"""Stopping at a good moment: a signal is noted, and asked for after every step and every part of an evaluation."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether to stop: after the first Ctrl-C or SIGTERM; a second Ctrl-C interrupts at once.

    Of several processes, any may get the signal and all stop at the same moment, which jax's preemption service agrees
    on between the hosts. That service listens to SIGTERM itself, so a Ctrl-C is passed on to it as one. All must ask
    equally often.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    is_set = False

    def now(self) -> bool:
        return self.is_set

    def __call__(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


_moments = itertools.count(1)  # of the whole program: jax's service wants numbers that grow


class _Together(Stop):
    signals = (signal.SIGINT,)
    agreed = False  # jax says so once

    def now(self) -> bool:
        self.agreed = self.agreed or multihost_utils.reached_preemption_sync_point(next(_moments))
        return self.agreed

    def __call__(self, number: int, frame: Any) -> None:
        super().__call__(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Context in which the signals that stop a run are noticed, not obeyed at once."""
    stop = Stop() if jax.process_count() == 1 else _Together()
    try:
        before = {number: signal.signal(number, stop) for number in stop.signals}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
