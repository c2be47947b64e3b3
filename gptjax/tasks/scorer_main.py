"""Main program of a process that scores: reads a task, then (item, reply) and writes scores until its input ends.

A message is its length, 8 bytes, and a pickle. Only the process that started this one writes to its input.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pickle
import struct
import sys
import traceback
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a scorer prints is no score

    def write(value: Any) -> None:
        content = pickle.dumps(value)
        out.write(struct.pack("<q", len(content)) + content)
        out.flush()

    try:
        modules, content = pickle.loads(_read() or b"")
        for name, file in modules:
            _load(name, file)
        task = pickle.loads(content)
        _warm_up(task)
    except Exception as error:
        write(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    write("ready")
    from gptjax.tasks.task import Score

    while content := _read():
        i, reply = pickle.loads(content)
        try:
            write(task.score(i, reply))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            write(Score(0.0, status="failed", note=f"{reason} ({os.path.basename(place.filename)}:{place.lineno})"))


def _warm_up(task: Any) -> None:
    """Score an item's own reply, which reads the task's file and imports what scores: no reply's deadline counts it.
    What goes wrong here does so again with a reply, and is its score."""
    from gptjax.tasks.task import Reply

    with contextlib.suppress(Exception):
        task.score(0, Reply(task.example(0)[-1].text))


def _read() -> bytes | None:
    """The next message, or None at the end."""
    size = sys.stdin.buffer.read(8)
    return sys.stdin.buffer.read(struct.unpack("<q", size)[0]) if len(size) == 8 else None


def _load(name: str, file: str | None) -> None:
    """Import a module by name, or from its file if it was a program or was loaded from there."""
    if name != "__main__":
        try:
            importlib.import_module(name)
            return
        except ImportError:
            pass
    if file is None:
        raise ImportError(f"no module {name}, and no file of it")
    spec = importlib.util.spec_from_file_location("__mp_main__" if name == "__main__" else name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = sys.modules[spec.name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
