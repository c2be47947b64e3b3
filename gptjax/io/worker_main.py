"""Main program of a `Worker`'s process: limits it, then answers requests with the function `answer` of the file that
the command line names, until standard input ends. It imports nothing of gptjax, to start quickly.

Standard input has one JSON request a line, standard output one JSON answer. A request that takes more than `SECONDS` of
processor time ends the process; one that takes more than `MEMORY` is answered by a limit.
"""

from __future__ import annotations

import contextlib
import json
import resource
import runpy
import signal
import sys

SECONDS = 1.0
"""Processor time of a request."""
MEMORY = 512
"""Address space of the process, in MiB."""


def main() -> None:
    answer = runpy.run_path(sys.argv[1])["answer"]
    for limit, value in ((resource.RLIMIT_AS, MEMORY << 20), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # some systems do not limit the address space
            resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found = answer(json.loads(line))
        except MemoryError:
            found = {"limit": f"takes more than {MEMORY} MiB of memory"}
        text = json.dumps(found).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
