"""Sandbox for Python programs that a model wrote.

    run("def f(x):\\n    return x + 1\\nassert f(1) == 2", seconds=5)      # Outcome("passed")

On Linux (x86_64, aarch64) with Landlock the program cannot open a file but those of Python's standard library, write
any, reach a network, start processes or programs, or signal others; `sandbox_main.py` says by which means. It can see
that a file exists, and its size. Elsewhere it is refused unless `unconfined` is set: then there are limits of time and
memory alone.

Tests that run in the program can be cheated, by a result that is equal to everything for instance, but not by ending
early.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from gptjax.types import UserError

LIMIT = 1 << 16
"""Bytes of output that are read of a program."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """End of a program."""

    status: Literal["passed", "failed", "timed out"]
    note: str = ""
    """The error."""
    output: str = ""
    """Beginning of what it printed."""

    @property
    def said(self) -> str:
        """The output, and the error."""
        return "\n".join(part for part in (self.output.strip(), self.note) if part)


def run(program: str, seconds: float = 10.0, memory: int = 512, unconfined: bool = False) -> Outcome:
    """Run a Python program to its end: "passed" if nothing was raised.

    seconds     wall-clock time, after which it is killed
    memory      address space, in MiB
    unconfined  run it also where it cannot be confined, with limits of time and memory alone

    Raises UserError where it cannot be confined."""
    key = secrets.token_hex(16)
    request = {"program": program, "key": key, "seconds": int(seconds), "memory": memory, "unconfined": unconfined}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox_main.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
    )
    with process:
        try:
            said = _talk(process, json.dumps(request).encode(), seconds)
        finally:
            process.kill()
    if said is None:
        return Outcome("timed out", f"no end in {seconds:g} s")
    text, _, output = said[1:].decode("utf-8", "replace").partition("\n")
    kind, text = said[:1], text.strip()
    if kind == b"U":
        raise UserError(
            f"sandbox: a program that a model wrote cannot be confined here ({text}); use another machine, or set "
            "unconfined=True if nothing on this one can be harmed"
        )
    if kind == b"P" and text == key:
        return Outcome("passed", output=output)
    if kind == b"E":
        return Outcome("failed", text, output)
    return Outcome("failed", f"ended before its last line, with exit code {process.wait()}")


def _talk(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes | None:
    """The process's output up to its end or `LIMIT`. None: no end in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    end, found, pipe = time.monotonic() + seconds, bytearray(), process.stdout.fileno()
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:
        return b""
    while len(found) < LIMIT:
        if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
            return None
        if not (piece := process.stdout.read1(LIMIT)):  # pyright: ignore[reportAttributeAccessIssue]
            break
        found += piece
    return bytes(found)
