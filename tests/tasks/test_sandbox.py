"""A program that a model wrote computes, and does nothing else: each way out of the sandbox is tried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax.tasks import HumanEval, Reply, sandbox
from gptjax.tasks.code import Program, completed
from gptjax.types import UserError


@pytest.fixture(autouse=True, scope="module")
def confined():
    try:
        sandbox.run("")
    except UserError as error:
        pytest.skip(str(error))


ERRORS = {
    "socket": ("import socket\nsocket.socket()", "PermissionError"),
    "socket in C": ("import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) != -1", "AssertionError"),
    "io_uring": ("import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) != -1", "AssertionError"),
    "read": ("open('/etc/passwd')", "PermissionError"),
    "read this file": (f"open({__file__!r})", "PermissionError"),
    "list": ("import os\nos.listdir('/')", "PermissionError"),
    "environment": ("open('/proc/self/environ')", "PermissionError"),
    "write": ("open('/tmp/written by a model', 'w')", "PermissionError"),
    "write where it can read": ("import os\nopen(os.__file__, 'a')", "PermissionError"),
    "temporary file": ("import tempfile\ntempfile.TemporaryFile()", "FileNotFoundError"),
    "folder": ("import os\nos.mkdir('/tmp/made by a model')", "PermissionError"),
    "delete": ("import os\nos.unlink('VICTIM')", "PermissionError"),
    "mode": ("import os\nos.chmod('VICTIM', 0)", "PermissionError"),
    "link": ("import os\nos.symlink('/etc', '/tmp/linked by a model')", "PermissionError"),
    "fork": ("import os\nwhile True: os.fork()", "PermissionError"),
    "program": ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
    "process": ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "PermissionError"),
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "Runtime",
    ),
    "signal parent": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "signal all": ("import os\nos.kill(-1, 9)", "PermissionError"),
    "signal a thread": (
        "import os, ctypes\nassert ctypes.CDLL(None).syscall(234, os.getppid(), os.getppid(), 9) == 0",
        "As",
    ),
    "signal by a file": ("import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    "trace": ("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0", "AssertionError"),
    "namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
    "limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
    "memory at once": ("bytearray(1 << 30)", "MemoryError"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "exit": ("raise SystemExit(0)", "SystemExit"),
    "exit at once": ("import os\nos._exit(0)", "ended before its last line"),
    "false success": (
        "import os\nfor i in range(16):\n  try: os.write(i, b'P0123\\n')\n  except OSError: pass\nos._exit(0)",
        "ended before its last line",
    ),
    "abort": ("import os\nos.abort()", "ended before its last line"),
    "crash": ("import ctypes\nctypes.string_at(0)", "ended before its last line"),
    "flood of results": ("import os\nwhile True: os.write(3, b'x' * 9999)", "ended before its last line"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_program_cannot_leave(name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("here")
    program, error = ERRORS[name]
    found = sandbox.run(program.replace("VICTIM", str(victim)), seconds=20, memory=256)
    assert (found.status, error in found.note) == ("failed", True), found
    assert victim.read_text() == "here"
    assert victim.stat().st_mode & 0o400
    assert not [file for file in os.listdir("/tmp") if file.endswith("by a model")]


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time\ntime.sleep(99)", "while True: print('x' * 9999)"]
)
def test_time_ends(program):
    started = time.monotonic()
    assert sandbox.run(program, seconds=0.5).status == "timed out"
    assert time.monotonic() - started < 5


def test_a_program_computes_with_the_standard_library():
    program = "import collections, hashlib, heapq, itertools, json, math, random, re, statistics, typing\n"
    program += "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()\n"
    program += "print('noise' * 100_000)\nassert hashlib.md5(b'x').hexdigest() and random.random() < 1"
    found = sandbox.run(program, seconds=20)
    assert (found.status, found.note) == ("passed", "")
    assert found.output == ("\n" + "noise" * 100_000)[:4_000]


def test_a_program_ends_with_the_process_that_started_it(tmp_path):
    """Else one that a deadline has killed would leave its program behind."""
    code = "import os\nfrom gptjax.tasks import sandbox\nprint(os.getpid(), flush=True)\n"
    code += "sandbox.run('while True: pass', 60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        parent = int(process.stdout.readline())

        folder = Path(f"/proc/{parent}/task/{parent}/children")
        while (
            not (found := folder.read_text().split()) or "sandbox" not in Path(f"/proc/{found[0]}/cmdline").read_text()
        ):
            time.sleep(0.05)
        time.sleep(0.5)  # it asks for the signal before it runs the program
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{found[0]}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{found[0]}")


def test_it_is_refused_where_it_cannot_be_confined(monkeypatch, tmp_path):
    text = (Path(sandbox.__file__).with_name("sandbox_main.py")).read_text()
    (tmp_path / "sandbox_main.py").write_text(
        text.replace('"landlock_create_ruleset": 444', '"landlock_create_ruleset": 999')
    )
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(
        UserError, match=r"sandbox: a program that a model wrote cannot be confined here .* needs Landlock"
    ):
        sandbox.run("")
    assert sandbox.run("", unconfined=True).status == "passed"


ITEM = Program("import math\n\ndef half(x):\n    '''Half of x.'''\n", "    return x / 2\n", "", "half")


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("    return x / 2\n", ITEM.prompt + "    return x / 2\n"),
        ("Here:\n```python\ndef half(x):\n    return 1\n```\nDone.", "import math\n\ndef half(x):\n    return 1\n"),
        ("```\n    return 3\n```", ITEM.prompt + "    return 3\n"),
        (
            "```python\ndef half(x):\n    return 1\n```\n```python\nprint(half(3))\n```",
            "import math\n\ndef half(x):\n    return 1\n",
        ),
        ("```python\ndef half(x): return 1\n```\n```python\ndef half(x): return 2\n```", None),
        ("  \n", None),
    ],
)
def test_programs_are_found_in_replies(reply, program):
    assert completed(ITEM, reply) == program


def test_human_eval_scores_in_the_sandbox(tmp_path):
    path = tmp_path / "functions.jsonl"
    fields = ("prompt", "canonical_solution", "test", "entry_point")
    test = "def check(candidate):\n    assert candidate(3) == 1.5\n"
    path.write_text(json.dumps(dict(zip(fields, (ITEM.prompt, ITEM.solution, test, "half"), strict=True))) + "\n")
    task = HumanEval(str(path), seconds=1)
    assert task.text(0) == ITEM.prompt
    texts = (
        task.example(0)[-1].text,
        ITEM.solution,
        "    return 3\n",
        "    return missing\n",
        "    while True: pass\n",
        "",
    )
    scores = [task.score(0, Reply(text)) for text in texts]
    assert [score.outcome for score in scores] == [1, 1, 0, 0, 0, 0]
    assert [score.status for score in scores] == ["scored"] * 4 + ["timed out", "not found"]
    assert scores[3].note.startswith("NameError")
