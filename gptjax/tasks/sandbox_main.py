"""Main program of a sandbox: confines itself for good, then runs the Python program that standard input has. It imports
nothing of gptjax and reads no site-packages.

    no_new_privs, then Landlock: files of Python's standard library and shared libraries can be read; no file can be
                   written, no other opened, no socket connected, no other process signalled
    seccomp        a list of the system calls that a computation needs; all others fail: no socket, no new process or
                   program, no signal to another process, no change of files, owners or limits
    rlimits        processor time, memory, no file writes, no core files

Standard input has one JSON object; standard output gets a line: "P" and the key if the program ran to its end, "E" and
the error if it did not, "U" and the reason if it was not run because it cannot be confined here. After it comes the
beginning of what the program printed.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig

READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
"""Paths of shared libraries, read besides the standard library's."""
CALLS = {
    "x86_64": (
        0xC000003E,
        "0-15 17 19-21 23-25 28 32 35 38-39 60 63 79 89 96-99 102 104 107-108 110 131 186 201-202 204 "
        "217 228-231 257 262 267 269-271 273 318 332 334 439",
        {"clone": 56, "clone3": 435, "fcntl": 72, "tgkill": 234},
    ),
    "aarch64": (
        0xC00000B7,
        "17 23 48 56-57 61-67 72-73 78-80 93-94 98-99 101 103 113-115 123-124 132 134-135 139 160 163 "
        "165 169 172-179 214-216 222 226 233 278 291 293 439",
        {"clone": 220, "clone3": 435, "fcntl": 25, "tgkill": 131},
    ),
}
"""Machine -> its number for seccomp, numbers of the system calls that are allowed, and of those that depend on an
argument. Reading, memory, time, waiting, threads, own identity; man 2 syscalls, man 2 seccomp."""
CLONE_THREAD = 0x10000
DESCRIPTORS = (1, 2, 3, 1030)
"""Commands of fcntl that read and set the flags of a descriptor, and copy it. (Others make the kernel send signals.)"""
LANDLOCK_FILES = ((1, 13), (2, 14), (3, 15), (5, 16))
"""(version, number of kinds of access to files that it knows)."""
PRINTED = 4_000
"""Maximum number of characters of output."""
EXECUTE, READ_FILE, READ_DIR = 1, 4, 8


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    out, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.set_inheritable(out, False)
    megabytes, seconds = request["memory"], request["seconds"]
    limits = ((resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_CPU, seconds + 1), (resource.RLIMIT_CORE, 0))
    for limit, value in (*limits, (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        confine()
    except Exception as error:
        if not request["unconfined"]:
            os.write(out, f"U{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    sys.stdout = printed = io.StringIO()
    try:
        scope = {"__name__": "program"}
        exec(compile(request["program"], "program", "exec"), scope)
    except BaseException as error:
        text = f"E{type(error).__name__}: {' '.join(str(error)[:300].split())}\n{printed.getvalue()[:PRINTED]}"
        os.write(out, text.encode("utf-8", "replace"))
        os._exit(1)
    os.write(out, f"P{request['key']}\n{printed.getvalue()[:PRINTED]}".encode("utf-8", "replace"))
    os._exit(0)


def confine() -> None:
    """Confine this process for good. Raises OSError if the system cannot."""
    if sys.platform != "linux" or platform.machine() not in CALLS or sys.byteorder != "little":
        raise OSError(
            f"there is no sandbox for {sys.platform} on {platform.machine()}, but for Linux on {', '.join(CALLS)}"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long

    def call(name: str, *arguments: object) -> int:
        number = {
            "prctl": None,
            "landlock_create_ruleset": 444,
            "landlock_add_rule": 445,
            "landlock_restrict_self": 446,
        }
        found = libc.prctl(*arguments) if number[name] is None else libc.syscall(number[name], *arguments)
        if found < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")
        return found

    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the process that started this one
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _landlock(call)
    _seccomp(call)


def _landlock(call) -> None:
    try:
        version = call("landlock_create_ruleset", None, ctypes.c_size_t(0), 1)
    except OSError as error:
        raise OSError(
            f"files cannot be confined: needs Landlock, Linux 5.13 or newer with it switched on ({error})"
        ) from None
    files = (1 << max(kinds for least, kinds in LANDLOCK_FILES if version >= least)) - 1
    network, scoped = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    fields = [files, *([network] if version >= 4 else []), *([scoped] if version >= 6 else [])]
    attributes = struct.pack(f"<{len(fields)}Q", *fields)
    rules = call("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), 0)
    library = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    for path in {*READABLE, *library, os.path.join(sys.base_prefix, sys.platlibdir)}:
        if not os.path.exists(path):
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = READ_FILE | ((EXECUTE | READ_DIR) if os.path.isdir(path) else 0)
        call("landlock_add_rule", rules, 1, struct.pack("<Qi", access, descriptor), 0)
        os.close(descriptor)
    call("landlock_restrict_self", rules, 0)
    os.close(rules)


def _seccomp(call) -> None:
    machine, allowed, others = CALLS[platform.machine()]
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    not_permitted, not_there = 0x00050000 | 1, 0x00050000 | 38
    number, architecture, argument = 0, 4, (16, 24)  # places in struct seccomp_data
    code = [
        (load, 0, 0, architecture),
        (equal, 1, 0, machine),
        (end, 0, 0, kill),
        (load, 0, 0, number),
        (equal, 0, 1, others["clone3"]),
        (end, 0, 0, not_there),  # so that the C library makes threads by clone
    ]
    for one in _numbers(allowed):
        code += [(equal, 0, 1, one), (end, 0, 0, allow)]
    code += [(equal, 0, 4, others["clone"]), (load, 0, 0, argument[0]), (any_bit, 0, 1, CLONE_THREAD)]
    code += [(end, 0, 0, allow), (end, 0, 0, not_permitted)]
    code += [(equal, 0, 4, others["tgkill"]), (load, 0, 0, argument[0]), (equal, 0, 1, os.getpid())]
    code += [(end, 0, 0, allow), (end, 0, 0, not_permitted)]
    code += [(equal, 0, 2 + 2 * len(DESCRIPTORS), others["fcntl"]), (load, 0, 0, argument[1])]
    for command in DESCRIPTORS:
        code += [(equal, 0, 1, command), (end, 0, 0, allow)]
    code += [(end, 0, 0, not_permitted), (end, 0, 0, not_permitted)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(program)))
    call("prctl", 22, 2, header, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _numbers(text: str) -> list[int]:
    """The numbers of "0-2 5"."""
    ends = ([int(end) for end in part.split("-")] for part in text.split())
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


if __name__ == "__main__":
    main()
