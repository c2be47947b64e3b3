"""Pairs of programs to be timed beside each other: gptjax, and a peer or a floor. `python -m benchmarks` runs them.

`python benchmarks/pairs.py PAIR SIDE` is one of the two, in a process of its own on one core. It warms up, prints
"ready", and for each line of its input, a number of seconds, runs for that long and prints the milliseconds per call.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Call = Callable[[], object]


def training() -> Mapping[str, Callable[[], Call]]:
    from train_step_cpu import SHAPES, gptjax_step

    def peer() -> Call:
        import torch
        from torch_gpt import make_step

        torch.set_num_threads(1)
        return make_step(SHAPES["tiny"], compiled=False)

    return {"gptjax": lambda: gptjax_step(SHAPES["tiny"]), "PyTorch": peer}


def decoding() -> Mapping[str, Callable[[], Call]]:
    import torch
    from decode_cpu import contenders

    torch.set_num_threads(1)
    return {
        "gptjax": lambda: contenders("6x384", 1, new=32)[0],
        "transformers": lambda: contenders("6x384", 1, new=32)[1],
    }


def fine_tuning() -> Mapping[str, Callable[[], Call]]:
    """Steps on packed conversations, their batches included, and on packed texts of the same words: 16 x 256 tokens."""

    def stepping(kind: str) -> Callable[[], Call]:
        def make() -> Call:
            import jax
            import numpy as np

            from gptjax import Stage, data, nn, objectives, optim
            from gptjax.train.program import program

            folder, draw = Path(tempfile.mkdtemp()), np.random.default_rng(0)
            words = np.array([f"w{i}" for i in range(1_000)])
            said = [[" ".join(draw.choice(words, draw.integers(1, 16))) for _ in range(2)] for _ in range(2_000)]
            turns = [[{"role": r, "content": x} for r, x in zip(("user", "assistant"), t, strict=True)] for t in said]
            (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in turns))
            (folder / "texts.txt").write_text("\n".join(" ".join(texts) for texts in said))
            kinds = {
                "chat": data.Chat(data.ChatJsonl(str(folder / "chat.jsonl")), length=256, batch=16),
                "texts": data.Pretrain(data.Text(str(folder / "texts.txt"), separator="\n"), length=256, batch=16),
            }
            tokenizer = data.Bytes().build(iter(()))
            model = nn.TransformerConfig(vocab=tokenizer.vocab, layers=4, width=128, heads=4).build()
            stage = Stage(kinds[kind], objectives.NextToken(), optim.AdamW(learning_rate=1e-3), steps=100_000)
            functions, batches = program(stage, model), kinds[kind].batches(tokenizer, "train", 0, folder)
            state = jax.jit(functions.init_state)()

            def step() -> None:
                nonlocal state
                state, metrics = functions.step(state, jax.device_put(next(batches)))
                jax.block_until_ready(metrics)

            return step

        return make

    return {"gptjax": stepping("chat"), "pretraining": stepping("texts")}


def beside_trl(script: str, work: str, batch: int) -> Mapping[str, Callable[[], Call]]:
    """A work of `dpo_cpu.py` or `grpo_cpu.py`, at 4 x 128."""
    from beside_trl import Shape, write_llama

    module, shape, folder = importlib.import_module(script), Shape(4, 128, batch, 128), tempfile.mkdtemp()
    write_llama(folder, shape)
    return {"gptjax": lambda: module.gptjax(folder, shape)[work], "trl": lambda: module.trl(folder, shape)[work]}


def packing() -> Mapping[str, Callable[[], Call]]:
    """A hundred batches of 16 x 256 tokens from a file of 20 MB; the floor takes them from an array in memory."""
    import numpy as np
    from input_pipeline import SEPARATOR, write

    def ours() -> Call:
        from gptjax.data import Pretrain
        from gptjax.data.store import Tokens
        from gptjax.data.tokenizers import Bytes

        folder = Path(tempfile.mkdtemp())
        write(folder / "corpus.bin", 20)
        tokenizer = Bytes().build(iter(())).with_specials(f"<|{i}|>" for i in range(50_000))
        source = Tokens(str(folder / "corpus.bin"), str(folder / "corpus.bin"), separator=SEPARATOR)
        batches = Pretrain(source, 256, 16).batches(tokenizer, "train", 0, folder)
        return lambda: [next(batches) for _ in range(100)]

    def floor() -> Call:
        tokens, rng = np.zeros(10_000_000, np.uint16), np.random.default_rng(0)

        def batch() -> np.ndarray:
            starts = rng.integers(0, len(tokens) - 257, 16)
            return np.stack([tokens[start : start + 257] for start in starts]).astype(np.int32)

        return lambda: [batch() for _ in range(100)]

    return {"gptjax": ours, "copying": floor}


def checkpoint(restore: bool) -> Mapping[str, Callable[[], Call]]:
    """Float32 arrays of 64 MB to or from the disk, verified; the floor writes or reads the bytes."""
    import numpy as np

    arrays = {str(i): np.random.default_rng(i).standard_normal(2_000_000, np.float32) for i in range(8)}
    folder = Path(tempfile.mkdtemp())

    def ours() -> Call:
        import jax

        from gptjax.checkpoint.checkpoint import Checkpoints

        checkpoints, state, step = Checkpoints(folder, max_to_keep=1), jax.device_put(arrays), 0
        abstract = jax.eval_shape(lambda: state)

        def save() -> None:
            nonlocal step
            step += 1
            checkpoints.save(step, state, {})
            checkpoints.wait()

        if not restore:
            return save
        save()
        return lambda: jax.block_until_ready(checkpoints.restore(abstract).state)

    def floor() -> Call:
        file = folder / "bytes"

        def write() -> None:
            with file.open("wb") as out:
                for array in arrays.values():
                    out.write(array.data)
                out.flush()
                os.fsync(out.fileno())

        write()
        return file.read_bytes if restore else write

    return {"gptjax": ours, "the disk": floor}


def start_up() -> Mapping[str, Callable[[], Call]]:
    def importing(module: str) -> Callable[[], Call]:
        return lambda: lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    return {"gptjax": importing("gptjax.nn.transformer, gptjax.train.step"), "PyTorch": importing("torch")}


def compiling() -> Mapping[str, Callable[[], Call]]:
    """Compilation of a training step: of 48 layers, beside 16 of the same, which is scanned too."""

    def compiled(layers: int) -> Callable[[], Call]:
        def make() -> Call:
            import jax
            from train_step_cpu import SHAPES, gptjax_step

            jax.config.update("jax_enable_compilation_cache", False)
            step = gptjax_step(dataclasses.replace(SHAPES["tiny"], layers=layers, width=32, batch=1))

            def call() -> None:
                jax.clear_caches()
                step()

            return call

        return make

    return {"gptjax": compiled(48), "16 layers": compiled(16)}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two programs that do the same work, or a floor's."""

    sides: Callable[[], Mapping[str, Callable[[], Call]]]
    """Name -> how to make it; the first is gptjax."""
    peer: str
    """Name of the second."""
    clock: str = "cpu"
    """"cpu": the time of the processor, fair on a busy machine; "wall" where a disk is waited for."""
    guarded: bool = False
    """True: `--against` compares it."""


PAIRS = {
    "training step, 4 x 128": Pair(training, "PyTorch", guarded=True),
    "fine-tuning step, 4 x 128": Pair(fine_tuning, "pretraining"),
    "DPO step, 4 x 128": Pair(lambda: beside_trl("dpo_cpu", "step", 4), "trl"),
    "GRPO update, 4 x 128": Pair(lambda: beside_trl("grpo_cpu", "update", 16), "trl"),
    "GRPO rollouts, 4 x 128": Pair(lambda: beside_trl("grpo_cpu", "rollouts", 16), "trl"),
    "decoding 32 tokens, 6 x 384": Pair(decoding, "transformers", guarded=True),
    "100 packed batches": Pair(packing, "copying", guarded=True),
    "checkpoint of 64 MB": Pair(lambda: checkpoint(restore=False), "the disk", clock="wall"),
    "restoring 64 MB": Pair(lambda: checkpoint(restore=True), "the disk", clock="wall"),
    "start-up: imports": Pair(start_up, "PyTorch"),
    "compiling 48 layers": Pair(compiling, "16 layers"),
}
"""Name of a row -> pair."""


def clocks() -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of this process and its children."""
    return time.perf_counter(), sum(os.times()[:4])


def serve(call: Call) -> None:
    """Answer each line of the input."""
    for line in sys.stdin:
        start, calls = clocks(), 0
        while calls == 0 or time.perf_counter() - start[0] < float(line):
            call()
            calls += 1
        wall, cpu = (1e3 * (end - begin) / calls for end, begin in zip(clocks(), start, strict=True))
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


def main(pair: str, side: str) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    from gptjax.distributed import processes

    processes.configure()
    call: Any = PAIRS[pair].sides()[side]()
    call()
    call()
    print("ready", flush=True)
    serve(call)


if __name__ == "__main__":
    main(*sys.argv[1:])
