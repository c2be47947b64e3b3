"""Compilation as far as a plan reads it: the optimised program and its buffer assignment.

XLA has no option that stops there (`xla_early_exit_with_layouts` stops before fusion), and the machine code that
follows takes most of the time. So the compiler dumps both to files, in a thread, and nobody waits for the machine code.
`in_child` gives the compilation a process of its own, which ends with its result, and with it the thread.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gptjax.plan.buffers import Buffers
from gptjax.types import UserError

T = TypeVar("T")
DUMPS = ("", "-buffer-assignment", "-live-range", "-memory-usage-report")
"""Suffixes of the files that the compiler writes, in any order, when the program is optimised."""
POLL = 0.05
"""Seconds between two looks at the compiler's files."""


@dataclasses.dataclass(frozen=True)
class Optimised:
    """An optimised program."""

    text: str
    buffers: Buffers


def optimise(lowered: Any, platform: str) -> Optimised:
    """Compile a `jax.stages.Lowered` until its dumps are there; on CPU to the end. Raises the compiler's errors, such
    as `JaxRuntimeError` if the program does not fit. Elsewhere than on CPU the compiler goes on in a thread: call this
    in a process that ends soon."""
    if platform == "cpu":
        compiled = lowered.compile()
        return Optimised(compiled.as_text(), Buffers.of(compiled.memory_analysis()))
    with tempfile.TemporaryDirectory(prefix="gptjax-plan-", ignore_cleanup_errors=True) as name:
        folder, options = Path(name), {"xla_dump_to": name, "xla_dump_hlo_as_text": True}
        errors: list[Exception] = []

        def compile() -> None:
            try:
                lowered.compile(options)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=compile, daemon=True)
        thread.start()
        sizes, before = [], None
        while thread.is_alive() and not (sizes == before and _complete(folder)):
            time.sleep(POLL)
            sizes, before = [file.stat().st_size for file in _files(folder)], sizes
        if errors:
            raise errors[0]
        return _read(folder)


def in_child(function: Callable[[], T]) -> T:
    """function(), called in a forked process that ends, threads and all, as soon as it has returned. Its UserError is
    raised here. The result is pickled. Call it before jax has initialised a device."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        code = 1
        try:
            tempfile.tempdir = folder  # the compiler may go on writing until the end
            sender.send(function())
            code = 0
        except UserError as error:
            sender.send(error)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    with tempfile.TemporaryDirectory(prefix="gptjax-plan-") as folder:
        process = context.Process(target=run)
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            raise UserError("plan: the compiler failed; its message is above") from None
        finally:
            process.join()
    if isinstance(result, UserError):
        raise result
    return result


def _files(folder: Path) -> list[Path]:
    return [file for suffix in DUMPS for file in folder.glob(f"*after_optimizations{suffix}.txt")]


def _complete(folder: Path) -> bool:
    """True if every dump is there, and the program's text ends with its entry."""
    files = _files(folder)
    if len(files) < len(DUMPS) or not all(file.stat().st_size for file in files):
        return False
    text = files[0].read_text()
    return "\nENTRY " in text and text.rstrip().endswith("}")


def _read(folder: Path) -> Optimised:
    text, assignment, live = (file.read_text() for file in _files(folder)[:3])
    return Optimised(text, Buffers.parse(assignment, live))
