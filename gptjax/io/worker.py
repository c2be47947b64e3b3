"""Processes with limits of time and memory, for what comes from the network and may never end."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


class Worker:
    """A process that answers requests, started when it is asked and ended by what exceeds its limits.

    program  file with the function `answer`: a request, of JSON types -> its answer; see `worker_main.py`
    """

    TIMEOUT = 15.0
    """Seconds to wait for an answer. The process ends itself after a second of processor time."""

    def __init__(self, program: Path):
        self.program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The program's answer, or {"limit": reason} if it was ended."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = self._start()
            found = b""
            try:
                with contextlib.suppress(OSError):  # it has ended
                    assert self._process.stdin is not None
                    self._process.stdin.write(line)
                    found = self._read()
            except BaseException:  # Ctrl-C: whoever asks next must not get this answer
                self.close()
                raise
            if found:
                return json.loads(found)
            code = None if found is None else self._process.wait()
            self.close()
        if code == -signal.SIGPROF:
            return {"limit": "takes more than a second"}
        ended = f"no answer in {self.TIMEOUT:g} s" if code is None else f"exit code {code}"
        return {"limit": f"cannot be handled by the process for it ({ended})"}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        """A signal to this process's group, such as Ctrl-C, is not for the worker."""
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker_main.py")), str(self.program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            process_group=0,
        )

    def _read(self) -> bytes | None:
        """A line of the process's output, empty if it has ended. None: no answer in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        found, end, pipe = bytearray(), time.monotonic() + self.TIMEOUT, self._process.stdout.fileno()
        while not found.endswith(b"\n"):
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
                return None
            if not (part := os.read(pipe, 1 << 16)):
                return b""
            found += part
        return bytes(found)
