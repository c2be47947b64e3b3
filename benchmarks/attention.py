"""Attention implementations compared with the reference, forward and backward, as a markdown table.

    python benchmarks/attention.py                                   # what this machine can run, 256 to 8,192 tokens
    python benchmarks/attention.py --cores 1 --length 1024 --dtype bfloat16

Causal self-attention. Kernels for other hardware are left out. On a CPU, time is CPU time, which on one core is fair
even on a busy machine; elsewhere it is wall time. Memory is that of the compiled program without its arguments and
results. A program that needs more than `--memory` is not run.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--length", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192], help="T = S")
parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
parser.add_argument("--heads", type=int, default=6, help="query heads (default 6)")
parser.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
parser.add_argument("--head-size", type=int, default=64, help="(default 64)")
parser.add_argument("--window", type=int, help="sliding window in tokens (default: none)")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: float32 on a CPU, else bfloat16)")
parser.add_argument("--memory", type=float, default=4.0, help="maximum GiB of a program (default 4)")
parser.add_argument("--turns", type=int, default=5, help="turns of each (default 5)")
parser.add_argument("--cores", type=int, help="cores to use (default: all)")
arguments = parser.parse_args()
if arguments.cores:
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: arguments.cores]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from gptjax.kernels.attention import IMPLEMENTATIONS, Mask, attention  # noqa: E402
from gptjax.kernels.attention.reference import reference  # noqa: E402

PLATFORM = jax.default_backend()
DTYPE = arguments.dtype or ("float32" if PLATFORM == "cpu" else "bfloat16")
MIB = 2**20


def inputs(length: int) -> list[jax.Array]:
    heads = arguments.heads, *[arguments.kv_heads or arguments.heads] * 2
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (arguments.batch, length, n, arguments.head_size), DTYPE)
        for key, n in zip(keys, heads, strict=True)
    ]


def compiled(function: Callable[..., jax.Array], arrays: list[jax.Array]) -> jax.stages.Compiled:
    """Compile value and gradients of a loss that gives each element of the result a distinct gradient."""

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(function(*arrays, Mask(window=arguments.window)).astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()


def contenders(arrays: list[jax.Array]) -> dict[str, jax.stages.Compiled]:
    """Name -> program, for the implementations that support these inputs on this machine."""
    found = {"reference": compiled(reference, arrays)}
    for name in IMPLEMENTATIONS:
        if name == "splash" and PLATFORM != "tpu":
            continue  # interpreted: its time means nothing
        try:
            found[name] = compiled(functools.partial(attention, implementation=name), arrays)
        except ValueError as error:
            print(f"<!-- {arrays[0].shape[1]}: {error} -->")
    return found


def milliseconds(program: jax.stages.Compiled, arrays: list[jax.Array]) -> float:
    clock = time.process_time if PLATFORM == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(program(*arrays))
    return 1e3 * (clock() - start)


def measure(length: int) -> None:
    arrays = inputs(length)
    programs = contenders(arrays)
    memory = {name: program.memory_analysis().temp_size_in_bytes / MIB for name, program in programs.items()}
    running = {name: program for name, program in programs.items() if memory[name] < 1024 * arguments.memory}
    for program in running.values():
        jax.block_until_ready(program(*arrays))
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(arguments.turns):
        for name, program in running.items():
            times[name].append(milliseconds(program, arrays))
    ms = {name: statistics.median(turns) for name, turns in times.items()}
    for name in programs:
        took = f"{ms[name]:,.1f}" if name in ms else "not run"
        ratio = f"{ms[name] / ms['reference']:.2f}" if {name, "reference"} <= set(ms) else ""
        share = f"{memory[name] / memory['reference']:.2f}"
        print(f"| {length} | {name} | {took} | {ratio} | {memory[name]:,.0f} | {share} |", flush=True)


if __name__ == "__main__":
    a = arguments
    cores = f", {len(os.sched_getaffinity(0))} cores" if PLATFORM == "cpu" else ""
    print(f"# {jax.devices()[0].device_kind}{cores}, jax {jax.__version__}; {DTYPE}, {a.batch} x T x {a.heads} heads")
    print("| T | implementation | ms | of the reference's | MiB | of the reference's |")
    print("|---:|---|---:|---:|---:|---:|")
    for length in a.length:
        measure(length)
