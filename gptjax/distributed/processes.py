"""What a program sets once, before jax starts: where compiled programs are kept, how memory is, and which other
processes it works with."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

VECTORS = "xla_cpu_prefer_vector_width"
HEARTBEAT = 60  # seconds
LOST = 134  # SIGABRT, to a shell
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def prepare() -> None:
    """Call first thing in a program's main. Variables that are already set win.

    Compiled programs are kept on disk, so that going on, or running again, starts at once.

    On Linux, freed memory is kept for the next step. XLA's CPU backend allocates all that a step needs at its start and
    frees it at its end; glibc would give such large pieces back to the kernel and get them anew, page by page: 7 % of
    the training step of a model of 6 layers, 384 wide.

    Where the processor has vectors of 512 bits, XLA uses them: a tenth to a fifth off a token that is decoded alone.

    Where libtpu is there without a TPU, for `gptjax plan`, jax does not look for one, which it does loudly.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "gptjax" / "compilation"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    if importlib.util.find_spec("libtpu") is not None and not _tpu_chips():
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if glob.glob("/dev/nvidia[0-9]*") else "cpu")
    if sys.platform == "linux":
        flags = os.environ.get("XLA_FLAGS", "")
        if VECTORS not in flags and " avx512f" in Path("/proc/cpuinfo").read_text():
            os.environ["XLA_FLAGS"] = f"{flags} --{VECTORS}=512".strip()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
                libc.mallopt(option, value)


def several() -> bool:
    """Whether this process is one of several of a job, as the environment tells: `JAX_COORDINATOR_ADDRESS` is set, a
    TPU slice has several hosts (Compute Engine, GKE), or SLURM's `srun` or Open MPI's `mpirun` started several."""
    variables = os.environ
    hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
    return (
        "JAX_COORDINATOR_ADDRESS" in variables
        or int(variables.get("MEGASCALE_NUM_SLICES") or 1) > 1
        or ("SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS") or 1) > 1)
        or int(variables.get("OMPI_COMM_WORLD_SIZE") or 1) > 1
        or "," in (_tpu_vm_hosts() if hosts is None else hosts)
    )


def join() -> None:
    """Meet the other processes of the job. jax finds out who they are; where `JAX_COORDINATOR_ADDRESS` is all there is,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say it.

    A process that is not heard of for `GPTJAX_HEARTBEAT` seconds (60) counts as lost, and all end; so does one that is
    waited for as long when the others are at their end.
    """
    import jax

    from gptjax.types import UserError

    if jax.distributed.is_initialized():
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    told: dict[str, Any] = {field: int(os.environ[name]) for field, name in names.items() if name in os.environ}
    try:
        bound = int(os.environ.get("GPTJAX_HEARTBEAT", HEARTBEAT))
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=bound, shutdown_timeout_seconds=bound)
    except ValueError as error:
        raise UserError(
            f"distributed: {str(error).rstrip('.')}; set JAX_COORDINATOR_ADDRESS (host:port of the first process), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or say --no-distributed"
        ) from error


def meet(where: str) -> None:
    """Wait until all processes of the job are here: what one writes, others must not see too early or too late."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"gptjax: {where}")


def gather(value: Any) -> list[Any]:
    """What each process of the job says, in their order, in JSON's types: the disk is not the same for all at a moment,
    so that one must decide, or each knows a part. All must call it, and then have it when the last one has called."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    length = -(-int(sizes.max()) // 256) * 256  # few lengths, as each is compiled
    texts = multihost_utils.process_allgather(np.pad(text, (0, length - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def process_lost(error: Exception) -> bool:
    """Whether an error says that another process of the job is gone, as far as the runtime's words tell."""
    words = str(error).lower()
    if not any(sign in words for sign in ("gloo", "heartbeat", "coordination service", "another task")):
        return False
    import jax

    return jax.distributed.is_initialized()


def leave(command: str, error: Exception) -> NoReturn:
    """End this process at once, with exit code 134, as jax's runtime does where it is the first to find a process gone:
    an ordinary exit would wait for that process."""
    from gptjax.types import one_line

    print(
        f"error: another process of the job is gone, so this one ends too ({one_line(error)}); its own log says why. "
        f"Start all processes again, to go on from the last checkpoint: {command}",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


def _tpu_chips() -> list[str]:
    """The TPU chips of this machine, as files."""
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def _tpu_vm_hosts() -> str:
    """Hosts of the slice that this TPU VM is of, by commas; "" elsewhere. The machine's metadata server has them."""
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
