"""Processes that score replies. A scorer may run forever or die, so each has a deadline and can be killed.

    with Scorers(task) as scorers:
        score = scorers.submit(3, Reply("#### 72")).result()

A deadline, an error and a wrong answer are three things: status "timed out", "failed" and "scored".
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Self

from gptjax import config
from gptjax.tasks.task import Reply, Score, Task
from gptjax.types import UserError, one_line

START = 120.0
"""Seconds that a process may take to start."""
PATIENCE = 0.5
"""Seconds to wait for a process before another one is started."""


class Scorers:
    """Processes that score replies of a task.

    workers  number of processes
    timeout  seconds that a score may take, once a process has scored an item's own reply to get ready

    Raises UserError for a task that cannot be sent to another process."""

    def __init__(self, task: Task, workers: int = 2, timeout: float = 30.0):
        if workers < 1:
            raise UserError(f"workers: got {workers}, must be at least 1")
        if timeout <= 0:
            raise UserError(f"timeout: got {timeout}, must be above 0 seconds")
        modules = [(module.__name__, getattr(module, "__file__", None)) for module in config.modules(task)]
        try:
            content = pickle.dumps(task)
        except Exception as error:
            raise UserError(f"task: {task.name} cannot be sent to another process ({one_line(error)})") from None
        self.timeout = timeout
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(modules, content) for _ in range(workers)]
        self._unused = [*self._all]
        self._starting, self._closed = threading.Lock(), False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="scorer")
        self._threads.submit(lambda: self._idle.put(self._take()))  # the first one starts while replies are written

    def submit(self, i: int, reply: Reply) -> Future[Score]:
        """Score of a reply to item `i`, once there is one."""
        return self._threads.submit(self._score, i, reply)

    def _score(self, i: int, reply: Reply) -> Score:
        process = self._take()
        try:
            return process.score(i, reply, self.timeout)
        finally:
            self._idle.put(process)

    def _take(self) -> _Process:
        """A process that is idle, or a new one if there is none for a while. One starts at a time, as it takes longer
        than most scores do."""
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._starting:
            if self._closed:
                raise CancelledError
            try:
                return self._idle.get(timeout=PATIENCE if len(self._unused) < len(self._all) else 0)
            except queue.Empty:
                if self._unused:
                    self._unused[-1].start()
                    return self._unused.pop()
        return self._idle.get()

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._threads.shutdown()
        for process in self._all:  # one that was being started
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """One process, started when it is needed."""

    def __init__(self, modules: list[tuple[str, str | None]], task: bytes):
        self._first = pickle.dumps((modules, task))
        self._process: subprocess.Popen[bytes] | None = None

    def score(self, i: int, reply: Reply, timeout: float) -> Score:
        if self._process is None or self._process.poll() is not None:
            self.start()
        found = self._ask(pickle.dumps((i, reply)), timeout)
        if isinstance(found, Score):
            return found
        self.kill()
        if found is None:
            return Score(0.0, status="timed out", note=f"no score in {timeout:g} s")
        return Score(0.0, status="failed", note=found)

    def kill(self) -> None:
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with process:  # closes the pipes and waits
                self._process = None

    def start(self) -> None:
        """Start, or start again. Raises UserError if the process cannot read the task."""
        self.kill()
        # Never on the accelerator, which the model has.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gptjax.tasks.scorer_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            process_group=0,
        )
        if (answer := self._ask(self._first, START)) != "ready":
            self.kill()
            reason = f"no answer in {START:g} s" if answer is None else answer
            raise UserError(
                f"task: cannot be read by the process that scores ({reason}); define its class at the top level of a "
                'module, and begin the main program with if __name__ == "__main__":'
            )

    def _ask(self, content: bytes, timeout: float) -> Any:
        """The process's answer, a text if it ended, or None if there was none in time."""
        process, end = self._process, time.monotonic() + timeout
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack("<q", len(content)) + content)
            size = self._read(8, end)
            return size and pickle.loads(self._read(struct.unpack("<q", size)[0], end) or b"")
        except (OSError, EOFError):
            code = process.wait()
            return f"the process ended with exit code {code}"

    def _read(self, size: int, end: float) -> bytes | None:
        """Bytes of the process's output. None: not in time. Raises EOFError if the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        found, pipe = bytearray(), self._process.stdout.fileno()
        while len(found) < size:
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
                return None
            if not (piece := os.read(pipe, size - len(found))):
                raise EOFError
            found += piece
        return bytes(found)
