"""Process start-up and multi-process jobs: the compilation cache, memory settings, `jax.distributed`, and exchange of
small values between processes."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import os
import sys
import threading
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gptjax.distributed import xla

if TYPE_CHECKING:  # it imports jax, which `--help` does not wait for
    from gptjax.types import PyTree

Value = TypeVar("Value")
VECTORS = "xla_cpu_prefer_vector_width"
TIMEOUTS = {"GPTJAX_INITIALIZATION_TIMEOUT": 300, "GPTJAX_HEARTBEAT": 60}
"""Environment variables of time limits, and their defaults in seconds."""
PATIENCE = 30.0
"""Seconds before a process says that it waits for the others, or half of the limit if that is less."""
LOST = 134  # SIGABRT, to a shell
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def configure() -> None:
    """Configure jax and the C library. Call it first in a program's main; environment variables already set win.

    - Compiled programs are cached on disk, so that a resumed or repeated run starts without compiling.
    - On Linux, malloc keeps freed memory for the next step. XLA's CPU backend allocates a step's memory at its start
      and frees it at its end; glibc would return such large blocks to the kernel and fault them in again, page by page:
      7 % of the training step of a model with 6 layers of width 384.
    - XLA uses 512-bit vectors if the processor has them: 10 to 20 % less time per token decoded in a batch of one.
    - On a GPU, all programs are compiled with `xla.OPTIONS["gpu"]`.
    - If libtpu is installed (for `gptjax plan`) but there is no TPU, jax does not search for one, which logs errors.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "gptjax" / "compilation"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    gpus, flags = glob.glob("/dev/nvidia[0-9]*"), os.environ.get("XLA_FLAGS", "")
    if importlib.util.find_spec("libtpu") is not None and not _tpu_chips():
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if gpus else "cpu")
    if gpus:
        os.environ["XLA_FLAGS"] = flags = " ".join([flags, *xla.flags(xla.OPTIONS["gpu"])]).strip()
    if sys.platform == "linux":
        if VECTORS not in flags and " avx512f" in Path("/proc/cpuinfo").read_text():
            os.environ["XLA_FLAGS"] = f"{flags} --{VECTORS}=512".strip()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
                libc.mallopt(option, value)


def is_multi_process() -> bool:
    """True if the environment says that this process belongs to a multi-process job: `JAX_COORDINATOR_ADDRESS` is set,
    a TPU slice has several hosts (Compute Engine, GKE), or SLURM's `srun` or Open MPI's `mpirun` started several."""
    variables = os.environ
    hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
    return (
        "JAX_COORDINATOR_ADDRESS" in variables
        or int(variables.get("MEGASCALE_NUM_SLICES") or 1) > 1
        or ("SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS") or 1) > 1)
        or int(variables.get("OMPI_COMM_WORLD_SIZE") or 1) > 1
        or "," in (_tpu_vm_hosts() if hosts is None else hosts)
    )


def initialize() -> None:
    """Initialise `jax.distributed`. jax detects TPU slices, SLURM and Open MPI; elsewhere set
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Processes wait for one another for `GPTJAX_INITIALIZATION_TIMEOUT` seconds (300). Later, a process without a
    heartbeat for `GPTJAX_HEARTBEAT` seconds (60) counts as lost, and all processes exit. The same limit holds for the
    wait at shutdown.
    """
    import jax

    from gptjax.types import UserError

    if jax.distributed.is_initialized():
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    settings: dict[str, Any] = {field: int(os.environ[name]) for field, name in names.items() if name in os.environ}
    start, heartbeat = map(timeout, TIMEOUTS)
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    # Jax's runtime aborts after the limit, without a word about whom it waited for.
    told = (
        f"distributed: waiting for the other processes of the job; gives up {start} s after the start "
        "(GPTJAX_INITIALIZATION_TIMEOUT)"
    )
    waiting = threading.Timer(min(PATIENCE, start / 2), print, [told], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**settings, **limits, initialization_timeout=start)
    except ValueError as error:
        raise UserError(
            f"distributed: {str(error).rstrip('.')}; set JAX_COORDINATOR_ADDRESS (host:port of the first process), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass --no-distributed"
        ) from error
    finally:
        waiting.cancel()


def timeout(name: str) -> int:
    """Seconds of a time limit in `TIMEOUTS`, as the environment says. Raises UserError."""
    from gptjax.types import UserError

    text = os.environ.get(name, str(TIMEOUTS[name]))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}: got {text}, must be a whole number of seconds, at least 1")
    return int(text)


def barrier(where: str) -> None:
    """Wait until all processes of the job reach this point (a barrier), so that one does not read files too early."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"gptjax: {where}")


def allgather(value: PyTree) -> list[Any]:
    """All-gather a value of JSON types: the list of every process's value, in process order. A collective call.

    Processes may see a shared disk differently at one moment, so decisions that depend on it are made from one list."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    length = max(256, 1 << (int(sizes.max()) - 1).bit_length())  # few distinct lengths, as each one compiles
    texts = multihost_utils.process_allgather(np.pad(text, (0, length - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def on_first(function: Callable[[], Value]) -> Value:
    """The value of JSON types that a function has on the first process, which alone calls it. A collective call.
    Raises the function's UserError on every process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from gptjax.types import UserError

    if jax.process_count() == 1:
        return function()
    value = wrong = None
    if jax.process_index() == 0:
        try:
            value = function()
        except UserError as error:
            wrong = str(error)
    text = np.frombuffer(json.dumps([value, wrong]).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    length = -(-size // 256) * 256  # few distinct lengths, as each one compiles
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    value, wrong = json.loads(text[:size].tobytes())
    if wrong is not None:
        raise UserError(wrong)
    return value


def on_each(function: Callable[[], Value]) -> list[Value]:
    """The values of JSON types that a function has on each process, in process order. A collective call. If it raises
    on one of several processes, all raise a UserError: its own there, or after the traceback one with its message."""
    import jax

    from gptjax.types import UserError, one_line

    if jax.process_count() == 1:
        return [function()]
    value = wrong = None
    try:
        value = function()
    except UserError as error:
        wrong = error
    except Exception as error:
        traceback.print_exception(error)
        wrong = UserError(f"process {jax.process_index()}: {type(error).__name__}: {one_line(error)}")
    found = allgather([value, None if wrong is None else str(wrong)])
    if wrong is None:
        wrong = next((UserError(words) for _, words in found if words is not None), None)
    if wrong is not None:
        raise wrong
    return [value for value, _ in found]


def process_lost(error: Exception) -> bool:
    """True if the message of the runtime's error says that another process of the job is gone."""
    words = str(error).lower()
    if not any(sign in words for sign in ("gloo", "heartbeat", "coordination service", "another task")):
        return False
    import jax

    return jax.distributed.is_initialized()


def exit_after_loss(command: str, error: Exception) -> NoReturn:
    """Exit at once with code 134, as jax's runtime does when it detects a lost process; an ordinary exit would wait for
    the lost process."""
    from gptjax.types import one_line

    print(
        f"error: another process of the job is gone, or was silent for {timeout('GPTJAX_HEARTBEAT')} s "
        f"(GPTJAX_HEARTBEAT), so this one exits too ({one_line(error)}); see the other's log. "
        f"Start all processes again to resume from the last checkpoint: {command}",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


def _tpu_chips() -> list[str]:
    """Device files of this machine's TPU chips."""
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def _tpu_vm_hosts() -> str:
    """Comma-separated hosts of this TPU VM's slice, from the metadata server. "" on other machines."""
    if not _tpu_chips() or importlib.util.find_spec("libtpu") is None or "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""
