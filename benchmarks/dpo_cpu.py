"""A step of DPO on a CPU compared with trl's DPOTrainer, the same architecture, batch and work, as a markdown table.

    python benchmarks/dpo_cpu.py                        # one core, where CPU time is fair on a busy machine too

Each contender runs in its own process, in turns. A step is the loss of policy and reference, the gradient, clipping and
AdamW, on pairs of random tokens; all sequences are full, so that neither has padding. The ratio is trl's milliseconds
over gptjax's in the same turn; its median over the turns is given (above 1: gptjax is faster).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

VOCAB, HIDDEN = 2_048, 1_024
CONTENDERS = ("gptjax", "trl")


def pairs(batch: int, length: int) -> np.ndarray:
    """int32 [B, 2, T]: chosen and rejected conversations; the first quarter is the prompt."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=(batch, 2, length), dtype=np.int32)
    tokens[:, 1, : length // 4] = tokens[:, 0, : length // 4]
    return tokens


def gptjax_step(layers: int, width: int, batch: int, length: int) -> Callable[[], float]:
    """Step of a stage's program; each call returns the loss before the update."""
    import jax

    from gptjax import Stage, data, objectives, optim
    from gptjax.nn import TransformerConfig
    from gptjax.train.program import program
    from gptjax.types import PreferencePairs

    model = TransformerConfig(vocab=VOCAB, layers=layers, width=width, heads=width // 64, hidden=HIDDEN).build()
    tokens = pairs(batch, length).reshape(batch, 2 * length)
    segments = np.repeat(np.array([[1, 2]], np.int32), length, 1).repeat(batch, 0)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 2))
    weights = ((positions >= length // 4 - 1) & (positions < length - 1)).astype(np.float32)
    margins = np.zeros(batch, np.float32)
    made = PreferencePairs(tokens, np.roll(tokens, -1, 1), weights, segments, positions, margins)
    stage = Stage(
        data=data.Preferences(data.PreferencesJsonl(""), length=2 * length, batch=batch),
        objective=objectives.DPO(),
        optimizer=optim.AdamW(learning_rate=1e-4, clip=1.0),
        steps=100_000,
    )
    functions = program(stage, model)
    reference = jax.jit(functions.init_params)()
    state = jax.jit(functions.init_state)(reference)
    on_device: Any = jax.device_put(made)

    def run() -> float:
        nonlocal state
        state, metrics = functions.step(state, on_device, reference)
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    return run


def trl_step(layers: int, width: int, batch: int, length: int) -> Callable[[], float]:
    """Step of trl's trainer with its own loss, transformers' Llama and PyTorch's AdamW."""
    import copy
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
    )
    rows = Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}] * batch)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-4)
    ids = torch.tensor(pairs(batch, length).transpose(1, 0, 2).reshape(2 * batch, length).astype(np.int64))
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": (torch.arange(length) >= length // 4) * mask}

    def run() -> float:
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def work(pipe: Connection, contender: str, cores: int, sizes: tuple[int, int, int, int]) -> None:
    """Serve turns: receive a number of steps, send milliseconds per step (wall, CPU) and the last loss."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if contender == "gptjax":
        from gptjax.distributed import processes

        processes.configure()
        step = gptjax_step(*sizes)
    else:
        import torch

        torch.set_num_threads(cores)
        step = trl_step(*sizes)
    pipe.send(step())
    while steps := pipe.recv():
        times = []
        for _ in range(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        pipe.send((*map(statistics.median, zip(*times, strict=True)), loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--sizes", type=int, nargs=4, default=(6, 384, 4, 128), metavar=("L", "D", "B", "T"))
    options = parser.parse_args()
    context, pipes = multiprocessing.get_context("spawn"), {}
    for contender in CONTENDERS:
        pipes[contender], theirs = context.Pipe()
        arguments = (theirs, contender, options.cores, tuple(options.sizes))
        context.Process(target=work, args=arguments, daemon=True).start()
    starts = {contender: pipe.recv() for contender, pipe in pipes.items()}
    turns: dict[str, list[tuple[float, float, float]]] = {contender: [] for contender in CONTENDERS}
    for _ in range(options.turns):
        for contender, pipe in pipes.items():
            pipe.send(options.steps)
            turns[contender].append(pipe.recv())
    layers, width, batch, length = options.sizes
    load = f"{options.cores} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{layers} x {width}, {batch} pairs of 2 x {length} tokens, {load}\n")
    print("| | first loss | wall ms | CPU ms | trl's wall time / gptjax's | CPU time |\n|---|---:|---:|---:|---:|---:|")
    for contender, found in turns.items():
        wall, cpu = (statistics.median(turn[i] for turn in found) for i in (0, 1))
        ours = turns["gptjax"]
        ratios = [statistics.median(t[i] / o[i] for t, o in zip(found, ours, strict=True)) for i in (0, 1)]
        print(f"| {contender} | {starts[contender]:.4f} | {wall:.0f} | {cpu:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    for pipe in pipes.values():
        pipe.send(0)


if __name__ == "__main__":
    main()
