"""Graceful stops: a signal is answered at once, and obeyed after the step, or the batch of an evaluation.

Python calls a signal's handler only when the main thread is back from the devices, a compiler or a disk. So a thread
answers, which is woken by the interpreter's own C handler.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

GRACE = 2.0
"""Seconds after the second Ctrl-C in which KeyboardInterrupt may end the training; then the process is ended."""


class StopSignal:
    """Stop flag, set by the first Ctrl-C or SIGTERM. A second one interrupts at once.

    In a multi-process job any process may get the signal, and all stop at the same step: jax's preemption service
    synchronises them. That service handles SIGTERM itself, so a Ctrl-C is forwarded to it as SIGTERM. All processes
    must call `now` equally often.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    is_set = False

    def now(self) -> bool:
        return self.is_set

    def __call__(self, number: int, frame: object) -> None:
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

    def __call__(self, number: int, frame: object) -> None:
        super().__call__(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def signals(answer: Callable[[str], None]) -> Iterator[StopSignal]:
    """Context in which signals set the returned flag instead of interrupting. `answer` shows a line; it is called in
    another thread."""
    stop = StopSignal() if jax.process_count() == 1 else _SynchronisedStopSignal()
    if threading.current_thread() is not threading.main_thread():  # which owns the signals
        yield stop
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as the interpreter asks for
    with reader, writer:
        before = {number: signal.signal(number, stop) for number in stop.signals}
        woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        answering = threading.Thread(target=_answer, args=(reader, answer), name="signals", daemon=True)
        answering.start()
        try:
            yield stop
        finally:
            signal.set_wakeup_fd(woken_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.shutdown(socket.SHUT_WR)
            answering.join()


def _answer(reader: socket.socket, answer: Callable[[str], None]) -> None:
    """Answer each signal, whose number the interpreter writes, until the end of the context."""
    interrupts, told = 0, False
    while numbers := reader.recv(64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            answer("stopping at once")
            if not hasattr(sys, "ps1"):  # an interactive session lives on
                threading.Thread(target=_end, args=(reader.dup(), answer), daemon=True).start()
            return
        if not told:
            told = True
            answer("stopping after this step" + "; again: at once" * interrupts)


def _end(reader: socket.socket, answer: Callable[[str], None]) -> None:
    """End the process if the main thread, or the interpreter at its exit, waits for the devices. What is on disk is as
    sound as after a kill."""
    with reader:
        reader.settimeout(GRACE)
        try:
            while reader.recv(64):
                pass
        except TimeoutError:
            answer("stopped without saving; the same command resumes from the last checkpoint")
        else:
            threading.main_thread().join(10 * GRACE)
            if threading.main_thread().is_alive():
                return  # the program does something else
            time.sleep(GRACE)
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(128 + signal.SIGINT)
