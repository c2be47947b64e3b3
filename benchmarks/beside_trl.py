"""gptjax and trl in turns, each in a process of its own, as a markdown table: for `dpo_cpu.py` and `grpo_cpu.py`.

Both load the same random weights of a small Llama. A contender is a function (folder of the weights, shape) -> work by
name, each a call that returns a number to compare, its loss. A ratio is trl's time over gptjax's in the same turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

VOCAB, HIDDEN = 2_048, 1_024
Work = Mapping[str, Callable[[], float]]
Times = tuple[float, float]
"""Milliseconds of wall time and of CPU time."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of the model and of its batch."""

    layers: int
    width: int
    batch: int
    length: int
    """Tokens of a sequence; the first quarter is the prompt."""


def write_llama(folder: str, shape: Shape) -> None:
    """A random Llama of this shape, and a tokenizer of one word for each id."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.width,
        intermediate_size=HIDDEN,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        max_position_embeddings=max(shape.length, 512),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    tokenizer.save_pretrained(f"{folder}/tokenizer")


def serve(pipe: Connection, contender: Callable[[str, Shape], Work], folder: str, shape: Shape, cores: int) -> None:
    """Do each work once and send what it returned; then receive (name, number of calls), send medians of `Times`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["JAX_PLATFORMS"] = "cpu"
    work = contender(folder, shape)
    pipe.send({name: call() for name, call in work.items()})
    while asked := pipe.recv():
        name, calls = asked
        times = []
        for _ in range(calls):
            wall, cpu = time.perf_counter(), time.process_time()
            work[name]()
            times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        pipe.send(tuple(map(statistics.median, zip(*times, strict=True))))


def compare(
    description: str | None, ours: Callable[[str, Shape], Work], theirs: Callable[[str, Shape], Work], batch: int
) -> None:
    """Command line of a comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--calls", type=int, default=2, help="calls of a turn")
    parser.add_argument("--sizes", type=int, nargs=4, default=(6, 384, batch, 128), metavar=("L", "D", "B", "T"))
    options = parser.parse_args()
    shape = Shape(*options.sizes)
    context, pipes = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        write_llama(folder, shape)
        for contender in (ours, theirs):
            pipe, end = context.Pipe()
            context.Process(target=serve, args=(end, contender, folder, shape, options.cores), daemon=True).start()
            pipes.append(pipe)
        first = [pipe.recv() for pipe in pipes]
        turns: dict[str, list[tuple[Times, Times]]] = {name: [] for name in first[0]}
        for _ in range(options.turns):
            for name, found in turns.items():
                found.append((ask(pipes[0], name, options.calls), ask(pipes[1], name, options.calls)))
        for pipe in pipes:
            pipe.send(None)
    print(f"{dataclasses.asdict(shape)}, {options.cores} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| work | of | first value | wall ms | CPU ms | trl's wall time / gptjax's | CPU time | range |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for name, found in turns.items():
        wall, cpu = (sorted(b[i] / a[i] for a, b in found) for i in (0, 1))
        ratios = f"{statistics.median(wall):.2f} | {statistics.median(cpu):.2f} | {cpu[0]:.2f} to {cpu[-1]:.2f}"
        for i, who in enumerate(("gptjax", "trl")):
            times = (f"{statistics.median(turn[i][k] for turn in found):,.0f}" for k in (0, 1))
            print(f"| {name} | {who} | {first[i][name]:.4f} | {' | '.join(times)} | {ratios if i else ' | | '} |")


def ask(pipe: Connection, name: str, calls: int) -> Times:
    pipe.send((name, calls))
    return pipe.recv()
