"""A mixture of experts compared with a dense layer of as many FLOPs per token, forward and backward, on a CPU.

    python benchmarks/moe_cpu.py                             # width 512, 8 experts of 1,024, top 2
    python benchmarks/moe_cpu.py --tokens 512 --hidden 512

A step computes the output and the gradients of inputs and parameters. All take turns in one process; medians. Tokens
and router are random, so experts get unequal numbers of tokens. On a busy machine, CPU time is the better measure.
"""

from __future__ import annotations

import argparse
import statistics
import time

from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402

from gptjax.nn import MLP, MixtureOfExperts, SwiGLU  # noqa: E402


def step(part: MLP, hidden: int, x: jax.Array):
    """A function that runs one step and waits for it."""
    params = jax.jit(part.init, static_argnums=2)(jax.random.key(1), x, hidden)["params"]

    @jax.jit
    def compute(params, x, g):
        y, back = jax.vjp(lambda params, x: part.apply({"params": params}, x, hidden), params, x)
        return y, back(g)

    return lambda: jax.block_until_ready(compute(params, x, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "width": 512,
        "hidden": 1_024,
        "experts": 8,
        "top_k": 2,
        "tokens": 2_048,
        "turns": 11,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    x = jax.random.normal(jax.random.key(0), (1, args.tokens, args.width))
    sizes = {"experts": args.experts, "top_k": args.top_k}
    steps = {
        "dense": step(SwiGLU(), args.top_k * args.hidden, x),
        "dropless, blocks": step(MixtureOfExperts(**sizes), args.hidden, x),
        "dropless, ragged_dot": step(MixtureOfExperts(**sizes, implementation="ragged"), args.hidden, x),
        "capacity 1.25": step(MixtureOfExperts(**sizes, capacity=1.25), args.hidden, x),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(args.turns + 1):
        for name, run in steps.items():
            start = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print("| layer | wall ms | CPU ms | wall time / dense | CPU time / dense |\n|---|---:|---:|---:|---:|")
    for name, times in seconds.items():
        wall, cpu = (statistics.median(t[i] for t in times) for i in (0, 1))
        ratios = [
            statistics.median(mine[i] / dense[i] for mine, dense in zip(times, seconds["dense"], strict=True))
            for i in (0, 1)
        ]
        print(f"| {name} | {wall * 1e3:.0f} | {cpu * 1e3:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
