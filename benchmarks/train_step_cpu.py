"""The training step on a CPU compared with PyTorch's (`torch_gpt.py`, same architecture and sizes), as a markdown
table.

    python benchmarks/train_step_cpu.py                   # the three sizes, all cores
    python benchmarks/train_step_cpu.py --cores 1 --size small

Each contender runs in its own process, in short turns, so that other load affects all alike. The ratio is gptjax's
milliseconds over the faster PyTorch's in the same turn; its median over the turns is given (below 1: gptjax is faster).
Measure several cores only on an idle machine: PyTorch's threads spin while they wait for each other, and collapse when
something else takes a core. On one core, CPU time is fair on a busy machine too.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch_gpt import Shape

SHAPES = {
    "tiny": Shape(layers=4, width=128, heads=4, length=64, batch=12),
    "small": Shape(layers=6, width=384, heads=6, length=256, batch=4),
    "large-batch": Shape(layers=6, width=384, heads=6, length=256, batch=16),
}
CONTENDERS = ("gptjax", "torch eager", "torch.compile")


def gptjax_model(shape: Shape) -> Any:
    """The `Transformer` of `torch_gpt.GPT`."""
    from gptjax.nn import GELU, LayerNorm, LearnedPositions, Transformer, TransformerConfig

    config = TransformerConfig(
        vocab=shape.vocab,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        positions=LearnedPositions(shape.length),
        norm=LayerNorm(bias=False),
        mlp=GELU(),
    )
    return Transformer(config)


def gptjax_step(shape: Shape) -> Callable[[], float]:
    """gptjax's training step on a fixed random batch; each call returns the loss before the update."""
    import jax
    import numpy as np

    from gptjax.distributed.parameters import parameter_info
    from gptjax.objectives.next_token import NextToken
    from gptjax.optim.optimizers import AdamW
    from gptjax.train.state import create
    from gptjax.train.step import make_step
    from gptjax.types import Batch

    model = gptjax_model(shape)
    text = np.random.default_rng(0).integers(shape.vocab, size=(shape.batch, shape.length + 1), dtype=np.int32)
    tokens = text[:, :-1]
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(shape.length, dtype=np.int32), tokens.shape)
    batch = jax.device_put(Batch(tokens, text[:, 1:], ones.astype(np.float32), ones, positions))
    optimizer = AdamW(learning_rate=1e-3).build(100_000, parameter_info(model))
    state = create(model.init(jax.random.key(0), tokens)["params"], optimizer, jax.random.key(1))
    objective = NextToken()
    step = make_step(lambda apply, params, batch, key: objective(apply, params, batch), model.apply, optimizer)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    return run


def work(pipe: Connection, contender: str, shape: Shape, cores: int) -> None:
    """Serve turns: receive seconds, send the medians of milliseconds per step (wall, CPU) and the last loss."""
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[:cores])
    if contender == "gptjax":
        from gptjax.distributed import processes

        processes.configure()
        step = gptjax_step(shape)
    else:
        import torch
        from torch_gpt import make_step

        torch.set_num_threads(cores)
        step = make_step(shape, compiled=contender == "torch.compile")
    for _ in range(3):
        step()
    pipe.send("ready")
    while (seconds := pipe.recv()) is not None:
        wall, cpu, loss = [], [], 0.0
        while sum(wall) < seconds or len(wall) < 2:
            start = time.perf_counter(), time.process_time()
            loss = step()
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
        pipe.send((statistics.median(wall) * 1e3, statistics.median(cpu) * 1e3, loss))


def measure(name: str, contenders: list[str], cores: int, turns: int, seconds: float) -> None:
    shape = SHAPES[name]
    context = multiprocessing.get_context("spawn")
    workers = []
    for contender in contenders:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, contender, shape, cores), daemon=True)
        process.start()
        if here.recv() != "ready":
            raise RuntimeError(f"{contender} did not start")
        workers.append((here, process))
    rounds = []
    for _ in range(turns):
        results = []
        for pipe, _ in workers:
            pipe.send(seconds)
            results.append(pipe.recv())
        rounds.append(results)
    for pipe, process in workers:
        pipe.send(None)
        process.join()
    for i, contender in enumerate(contenders):
        wall, cpu = ([turn[i][k] for turn in rounds] for k in (0, 1))
        cells = [f"{statistics.median(wall):.1f}", f"{min(wall):.1f}", f"{statistics.median(cpu):.1f}"]
        for k in (0, 1):
            peers = [min(r[k] for j, r in enumerate(turn) if contenders[j] != "gptjax") for turn in rounds]
            cells.append(f"{statistics.median(turn[i][k] / p for turn, p in zip(rounds, peers, strict=True)):.2f}")
        print(f"| {name} | {contender} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=list(SHAPES), help="sizes (default: all)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="cores of each (default: all)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (default 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (slow to start)")
    arguments = parser.parse_args()
    contenders = [c for c in CONTENDERS if not (arguments.no_compile and c == "torch.compile")]
    for name in arguments.size:
        print(f"# {name}: {dataclasses.asdict(SHAPES[name])}, {arguments.cores} cores")
    print("| size | step of | wall ms, median | min | CPU ms | wall ratio | CPU ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in arguments.size:
        measure(name, contenders, arguments.cores, arguments.turns, arguments.seconds)


if __name__ == "__main__":
    main()
