"""Overheads of the training loop: checkpoints, metrics, restart.

    python benchmarks/overheads.py                       everything, as a markdown table
    python benchmarks/overheads.py checkpoint metrics    only these

checkpoint  runs with and without a save every 50 steps, in turns: the cost of one save, including background work, over
            the time of 50 steps
local       a checkpoint and a local checkpoint, in turns: until training could go on, and CPU time until it is written
metrics     runs with metrics logged and shown every 10 steps (the default) and never, in turns
report      CPU time of logging and showing metrics in the loop's own thread, over the time of 10 steps: an upper bound
            of the devices' wait, without the noise of two runs
clock       time per step of clock, heartbeat and watchdog alone
restart     from `python -m experiments` to the end of the first step, resumed from a checkpoint of 124M parameters,
            1.5 GB, with everything compiled before
"""

# ruff: noqa: E402  (jax reads what prepare() sets)

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.distributed import processes

processes.configure()

import jax

from gptjax import data, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.checkpoint.local import LocalCheckpoints
from gptjax.monitor.metrics import MetricsLogger
from gptjax.monitor.times import Clock
from gptjax.monitor.watchdog import Watchdog
from gptjax.nn import TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train import loop
from gptjax.train.loop import train
from gptjax.train.stage import Stage

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SAVE_EVERY = 50
NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Letters:
    """A source of random text, a megabyte."""

    def documents(self, split: str) -> Iterator[str]:
        rng = np.random.default_rng(split == "train")
        for _ in range(1000):
            yield "".join(rng.choice(list(LETTERS), 1000))

    def fingerprint(self) -> str:
        return "letters"


@dataclasses.dataclass(frozen=True)
class Timed(data.Pretrain):
    """Batches that note the time of the request for the second batch, when the first step is compiled and dispatched,
    and the start of validation, when the last step has ended."""

    times: dict[str, float] = dataclasses.field(default_factory=dict)

    def batches(self, *args, **options):
        times, batch = self.times, self.batch
        batches = super().batches(*args, **options)

        class Noting(type(batches)):
            def __next__(self) -> Any:
                if self.state()["sequence"] == batch:
                    times["begin"] = time.perf_counter()
                return super().__next__()

        batches.__class__ = Noting
        return batches

    def evaluation(self, *args, **options):
        def noting():
            self.times["end"] = time.perf_counter()
            yield from found

        found = super().evaluation(*args, **options)
        return _Iterable(noting)


@dataclasses.dataclass(frozen=True)
class _Iterable:
    make: Any

    def __iter__(self):
        return self.make()


def seconds(model: TransformerConfig, steps: int, batch: int, length: int, **options: Any) -> float:
    """Seconds that the training loop takes for `steps` steps."""
    timed = Timed(Letters(), length=length, batch=batch)
    every = {"evaluate_every": NEVER, "save_every": NEVER, "log_every": NEVER} | options
    stage = Stage(
        data=timed,
        objective=NextToken(),
        optimizer=optim.AdamW(learning_rate=1e-3, clip=1.0),
        steps=steps,
        eval_sequences=batch,
        prompts=(),
        **every,
    )
    tokenizer = data.TrainCharacters().build(iter([LETTERS]))
    with tempfile.TemporaryDirectory() as folder, MetricsLogger(folder) as records:
        records.log(0, "warm", loss=0.0)  # opens the files
        cache = Path(tempfile.gettempdir()) / "gptjax-overheads"
        train(stage, "main", model.build(), tokenizer, Path(folder) / "checkpoints", records, cache=cache)
    return timed.times["end"] - timed.times["begin"]


def model(layers: int, width: int) -> TransformerConfig:
    return TransformerConfig(vocab=4096, layers=layers, width=width, heads=width // 64 or 1)


def in_turns(repeats: int, run: Any, *variants: dict[str, Any]) -> list[list[float]]:
    """Seconds of each variant, one list per repeat."""
    return [[run(**variant) for variant in variants] for _ in range(repeats)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2%} | {min(values):.2%} to {max(values):.2%}"


def checkpoint(repeats: int, steps: int) -> None:
    saves = (steps - 1) // SAVE_EVERY
    for layers, width, batch, length in ((6, 384, 4, 256),):

        def run(**options: Any) -> float:
            return seconds(model(layers, width), steps, batch, length, **options)  # noqa: B023

        run()
        times = in_turns(repeats, run, {"save_every": SAVE_EVERY}, {})
        costs = [(saving - plain) / saves / (plain / steps * SAVE_EVERY) for saving, plain in times]
        print(
            f"| a save every {SAVE_EVERY} steps, {layers} x {width}, batch {batch} | {spread(costs)} | 3 % |",
            flush=True,
        )


def local(repeats: int, steps: int) -> None:
    shape = model(6, 384)
    tree = jax.eval_shape(shape.build().init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    keys = jax.random.split(jax.random.key(0), 3)  # parameters, and AdamW's moments
    copies = jax.tree.map(lambda leaf: [jax.random.normal(key, leaf.shape) for key in keys], tree)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(copies)) / 2**20
    blocked, spent = [], []
    with contextlib.ExitStack() as stack:
        disk, memory = (stack.enter_context(tempfile.TemporaryDirectory(dir=at)) for at in (None, "/dev/shm"))
        both = Checkpoints(disk), LocalCheckpoints(memory, "overheads", 1)
        for checkpoints in both:
            stack.enter_context(checkpoints)
        for step in range(repeats + 1):
            took, used = zip(*(_saved(checkpoints, step, copies) for checkpoints in both), strict=True)
            blocked, spent = [*blocked, took], [*spent, used]
    for what, rows in {"blocking, wall": blocked[1:], "in all, CPU": spent[1:]}.items():  # the first imports
        for name, values in zip(("a checkpoint", "a local checkpoint"), zip(*rows, strict=True), strict=True):
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"| {name} of {size:.0f} MB, {what} | {middle:.3f} s | {low:.3f} to {high:.3f} s | |", flush=True)


def _saved(checkpoints: Checkpoints | LocalCheckpoints, step: int, state: Any) -> tuple[float, float]:
    """Seconds until training could go on, and of CPU time until the checkpoint is written."""
    begin, used = time.perf_counter(), time.process_time()
    checkpoints.save(step, state, {})
    seconds = time.perf_counter() - begin
    checkpoints.wait()
    return seconds, time.process_time() - used


def metrics(repeats: int, steps: int) -> None:
    for layers, width, batch, length in ((4, 128, 12, 64), (6, 384, 4, 256)):

        def run(**options: Any) -> float:
            return seconds(model(layers, width), steps, batch, length, **options)  # noqa: B023

        run()
        times = in_turns(repeats, run, {"log_every": 10}, {})
        costs = [logging / plain - 1 for logging, plain in times]
        print(f"| metrics every 10 steps, {layers} x {width}, batch {batch} | {spread(costs)} | 1 % |", flush=True)


def reporting(repeats: int, steps: int) -> None:
    spent: list[float] = []
    original = loop._Run.report

    def timed(*arguments: Any) -> None:
        begin = time.thread_time()  # excludes waiting for the devices
        original(*arguments)
        spent.append(time.thread_time() - begin)

    shape = (
        model(4, 128),
        steps,
        12,
        64,
    )  # a report takes the same time for any model; this one's steps are the shortest
    seconds(*shape)
    found = []
    with unittest.mock.patch.object(loop._Run, "report", timed):
        for _ in range(repeats):
            spent.clear()
            took = seconds(*shape, log_every=10)
            found.append(statistics.median(spent) / (took / steps * 10))
    print(f"| one report in 10 steps, 4 x 128, batch 12 | {spread(found)} | 1 % |", flush=True)


def clock(repeats: int, steps: int) -> None:
    result = [jax.numpy.zeros(())]
    found = []
    with tempfile.TemporaryDirectory() as folder, Watchdog(folder, "main", 300) as watchdog:
        watch = Clock(0, 1, 1.0)
        for _ in range(repeats):
            begin = time.perf_counter()
            for step in range(1000):
                watch.lap("host")
                watch.lap("input")
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    pass
                watch.dispatched(result)
                watchdog.beat(step)
            found.append((time.perf_counter() - begin) / 1000 * 1e6)
    low, high = min(found), max(found)
    middle = statistics.median(found)
    print(f"| clock, heartbeat and watchdog, per step | {middle:.0f} us | {low:.0f} to {high:.0f} us | |")


RESTARTED = """
from gptjax import data, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.checkpoint.local import LocalCheckpoints
from gptjax.experiment.experiment import Experiment
from gptjax.nn import LearnedPositions, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train.stage import Stage

experiment = Experiment(
    model=TransformerConfig(
        vocab=50_304, layers=12, width=768, heads=12, hidden=3_072, positions=LearnedPositions(1_024)
    ),
    tokenizer=data.TrainCharacters(),
    stages={
        "main": Stage(
            data=data.Pretrain(data.Text("{text}"), length=128, batch=2),
            objective=NextToken(),
            optimizer=optim.AdamW(learning_rate=1e-4),
            steps=100_000,
            evaluate_every=10**9,
            eval_sequences=2,
            save_every=10**9,
            log_every=1,
            max_to_keep=1,
            prompts=(),
        )
    },
)
"""


def restart(repeats: int, steps: int) -> None:
    """Start, wait until the first step is logged, stop by SIGTERM, which saves, and repeat. The first two runs are not
    counted: they compile."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        text, file, metrics = (Path(folder) / name for name in ("text.txt", "restarted.py", "run/metrics.jsonl"))
        text.write_text("\n\n".join(Letters().documents("train")))
        file.write_text(RESTARTED.replace("{text}", str(text)))
        command = [sys.executable, "-m", "experiments", str(file), "--out", f"{folder}/run"]
        environment = os.environ | {"GPTJAX_CACHE": f"{folder}/cache"}
        for number in range(repeats + 2):
            known, begin = recorded(metrics), time.time()
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, env=environment, **streams)
            while len(recorded(metrics)) <= len(known) and process.poll() is None:
                time.sleep(0.1)
            process.terminate()
            _, error = process.communicate()
            if process.returncode != 130:
                raise RuntimeError(error.decode())
            if number > 1:
                found.append(recorded(metrics)[len(known)] - begin)
    low, high = min(found), max(found)
    print(f"| restart at 124M | {statistics.median(found):.1f} s | {low:.1f} to {high:.1f} s | 60 s |", flush=True)


def recorded(metrics: Path) -> list[float]:
    """Time at which each step ended."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [line["time"] for line in map(json.loads, lines) if "loss" in line]


PARTS = {
    "checkpoint": checkpoint,
    "local": local,
    "metrics": metrics,
    "report": reporting,
    "clock": clock,
    "restart": restart,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="parts to measure (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each (default 5)")
    parser.add_argument("--steps", type=int, default=201, help="steps of each run (default 201)")
    arguments = parser.parse_args()
    print("| part | cost, median | range | limit |")
    print("|---|---:|---:|---:|")
    for part in arguments.parts or PARTS:
        PARTS[part](arguments.repeats, arguments.steps)


if __name__ == "__main__":
    main()
