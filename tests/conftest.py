"""Tests run on 8 virtual CPU devices, with a compilation cache that outlives the run."""

import functools
import gc
import os
import sys
import tempfile
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tiny programs: compiling them takes longer than running them.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",  # these take most of a compilation's time
        "--xla_cpu_parallel_codegen_split_count=1",  # 32 modules of a tiny program take a third longer than one
    ]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "gptjax-test-compilation-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # walking pytest's stack for every traced operation
os.environ.setdefault("MPLBACKEND", "Agg")
# glibc in the processes that this one starts, workers too: memory that a compilation freed serves the next one, from
# one heap for all threads, where it was given back to the kernel and asked for again.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**28))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**24))
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))

import pytest

SHARED = Path(os.environ.get("GPTJAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to the slow tests, if all files are run, what is marked `alone`, and two thirds of the cases of each
    `sampled` law. A hash of a case's name chooses: laws of the same cases keep the same third, and a third of A times B
    has several of A and of B."""
    if {Path(config.rootpath, name) for name in config.args} != {config.rootpath / "tests"}:
        return
    laws = defaultdict(list)
    for item in items:
        if item.get_closest_marker("alone"):
            item.add_marker("slow")
        if item.get_closest_marker("sampled"):
            laws[item.path, item.originalname].append(item)
    for cases in laws.values():
        cases.sort(key=lambda item: zlib.crc32(item.callspec.id.encode()))
        for item in cases[-(-len(cases) // 3) :]:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Leave what all tests share, mostly imported modules, out of every later garbage collection; collect after 50,000
    new objects instead of 700, of which tracing makes so many that collecting took a tenth of the CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Free the compiled programs from time to time. Each has memory maps, of which Linux allows a process 65,530 in
    all: beyond, the compiler crashes. A file needs at most 20,000, which are 4 GB; programs serve several files."""
    yield
    maps = Path("/proc/self/maps")
    if (jax := sys.modules.get("jax")) and maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()  # programs in circles of references, which wait long for their turn


@pytest.fixture(autouse=True, scope="module")
def one_mlir_context() -> Iterator[None]:
    """Lower the programs of a file in one MLIR context per thread. jax makes one for each program, and loading its
    dialects takes up to half of the CPU time that a small program needs. The compiled programs are the same. A jax
    without this private function does without."""
    mlir = sys.modules.get("jax._src.interpreters.mlir")
    if not hasattr(mlir, "make_ir_context"):
        yield
        return
    make, threads = mlir.make_ir_context, threading.local()

    def shared() -> object:
        if not hasattr(threads, "context"):
            threads.context = make()
        return threads.context

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", shared)
        yield


@pytest.fixture(autouse=True, scope="module")
def one_program_per_stage() -> Iterator[None]:
    """Make equal programs of training stages once in a file. A run that is resumed or repeated makes its own anew, and
    most of its time is tracing and compiling it."""
    loop = sys.modules.get("gptjax.train.loop")
    if loop is None:
        yield
        return
    make = loop.program
    fields = (
        "objective",
        "optimizer",
        "adapter",
        "accumulate",
        "ema",
        "privacy",
        "quantisation",
        "divergence",
        "last_step",
    )

    @functools.cache
    def once(batch, length, values, model, seed, options, mechanism, mesh):
        """The program of a stage of which nothing is known but these arguments."""
        stage = SimpleNamespace(
            data=SimpleNamespace(batch=batch, length=length), **dict(zip(fields, values, strict=True))
        )
        made = make(stage, model, seed, dict(options), mechanism)
        vars(made)["init_state"] = made.init_state  # one object, by which `jit` knows it; a method is new each time
        return made

    def program(stage, model, seed=0, compiler_options=None, mechanism=None):
        values, options = tuple(getattr(stage, name) for name in fields), tuple((compiler_options or {}).items())
        mesh = sys.modules["jax"].sharding.get_mesh()
        arguments = stage.data.batch, stage.data.length, values, model, seed, options, mechanism, mesh
        try:
            hash(arguments)
        except TypeError:  # a part with a dictionary or an array
            return make(stage, model, seed, compiler_options, mechanism)
        return once(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "program", program)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The maintainers' folder of real data, tokenizers and trained models; the test skips where it is absent."""
    if not (SHARED / "data.md").exists():
        pytest.skip(f"needs the maintainers' shared folder of real data ({SHARED} is absent; set GPTJAX_SHARED)")
    return SHARED
