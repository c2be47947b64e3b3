"""The loss curve of a training run beside PyTorch's, from the same weights on the same batches, as a markdown table.

    python benchmarks/loss_curve.py                          # 500 steps at 4 x 128: about two minutes on one core

`torch_gpt.py` in float64 is the reference. gptjax and PyTorch, both in float32, differ from it by their rounding, which
training amplifies from step to step: gptjax is right if it stays as close as PyTorch does. The text is that of the
documentation in `docs/`; the optimizer is AdamW with clipping, warmup and cosine decay.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import torch
from torch_gpt import GPT, Shape
from train_step_cpu import gptjax_model

from gptjax.distributed.parameters import parameter_info
from gptjax.objectives import NextToken
from gptjax.optim import AdamW, Cosine
from gptjax.train.state import create
from gptjax.train.step import make_step
from gptjax.types import Batch, Params

SHAPE = Shape(layers=4, width=128, heads=4, length=64, batch=12, vocab=256)
OPTIMIZER = AdamW(learning_rate=1e-3, schedule=Cosine(warmup=50), decay_embeddings=True)


def documentation() -> bytes:
    docs = sorted((Path(__file__).resolve().parents[1] / "docs").rglob("*.md"))
    return b"".join(page.read_bytes() for page in docs)


def batches(text: bytes, shape: Shape, steps: int) -> np.ndarray:
    """int32 [steps, B, T + 1]: bytes of the text from random places."""
    ids = np.frombuffer(text, np.uint8)
    starts = np.random.default_rng(0).integers(len(ids) - shape.length, size=(steps, shape.batch, 1))
    return ids[starts + np.arange(shape.length + 1)].astype(np.int32)


def initial(shape: Shape) -> Params:
    """The parameters that all begin with."""
    tokens = np.zeros((1, shape.length), np.int32)
    return jax.tree.map(np.asarray, gptjax_model(shape).init(jax.random.key(0), tokens)["params"])


def gptjax_curve(shape: Shape, text: np.ndarray) -> np.ndarray:
    """float64 [steps]: the loss before each step."""
    transformer, objective = gptjax_model(shape), NextToken()
    optimizer = OPTIMIZER.build(len(text), parameter_info(transformer))
    state = create(jax.tree.map(jax.numpy.asarray, initial(shape)), optimizer, jax.random.key(1))
    step = make_step(lambda apply, params, batch, key: objective(apply, params, batch), transformer.apply, optimizer)
    ones = np.ones((shape.batch, shape.length), np.int32)
    positions = np.broadcast_to(np.arange(shape.length, dtype=np.int32), ones.shape)
    losses = []
    for rows in text:
        state, metrics = step(state, Batch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), ones, positions))
        total, weight = metrics["loss"]
        losses.append(float(total) / float(weight))
    return np.array(losses)


def torch_curve(shape: Shape, text: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 [steps]: the loss before each step."""
    torch.set_num_threads(1)  # several spin while they wait for each other, and collapse on a busy machine
    gpt = GPT(shape)
    gpt.load_state_dict(torch_parameters(initial(shape)))
    gpt = gpt.to(dtype)
    matrices = [p for p in gpt.parameters() if p.dim() == 2]
    scales = [p for p in gpt.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps)
    rate = OPTIMIZER.learning_rate_schedule(len(text))
    losses = []
    for i, rows in enumerate(torch.from_numpy(text).long()):
        for group in adamw.param_groups:
            group["lr"] = float(rate(i))
        adamw.zero_grad()
        loss = gpt(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), OPTIMIZER.clip or torch.inf)
        adamw.step()
        losses.append(loss.item())
    return np.array(losses)


def torch_parameters(params: Params) -> dict[str, torch.Tensor]:
    """These parameters under the names and in the layouts of `torch_gpt.GPT`."""
    found = {
        "tokens.weight": params["embedding"],
        "positions.weight": params["positions"]["table"],
        "norm.weight": params["norm"]["scale"],
    }
    blocks, width = params["blocks"], params["embedding"].shape[1]
    for i in range(len(blocks["norm_1"]["scale"])):
        attention, mlp = ({name: x[i] for name, x in blocks[part].items()} for part in ("attention", "mlp"))
        found |= {
            f"blocks.{i}.norm_1.weight": blocks["norm_1"]["scale"][i],
            f"blocks.{i}.norm_2.weight": blocks["norm_2"]["scale"][i],
            f"blocks.{i}.qkv.weight": np.concatenate([attention[name].reshape(width, width).T for name in "qkv"]),
            f"blocks.{i}.o.weight": attention["o"].reshape(width, width).T,
            f"blocks.{i}.up.weight": mlp["up"].T,
            f"blocks.{i}.down.weight": mlp["down"].T,
        }
    return {name: torch.from_numpy(np.array(x)) for name, x in found.items()}


def distances(text: bytes, shape: Shape, steps: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference's loss before each step, and the distances of gptjax and of PyTorch in float32 from it."""
    rows = batches(text, shape, steps)
    exact = torch_curve(shape, rows, torch.float64)
    curves = gptjax_curve(shape, rows), torch_curve(shape, rows, torch.float32)
    ours, theirs = (np.abs(curve - exact) for curve in curves)
    return exact, ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="default 500")
    for field in dataclasses.fields(Shape):
        default = getattr(SHAPE, field.name)
        parser.add_argument(f"--{field.name}", type=int, default=default, help=f"default {default}")
    given = vars(parser.parse_args())
    shape = Shape(**{name: given[name] for name in vars(SHAPE)})
    exact, ours, theirs = distances(documentation(), shape, given["steps"])
    print("| steps | loss, float64 | gptjax differs by at most | PyTorch by at most | ratio |")
    print("|---|---:|---:|---:|---:|")
    edges = [0, *(edge for edge in (1, 10, 50, 100, 200, 300, 400) if edge < len(exact)), len(exact)]
    for first, last in itertools.pairwise(edges):
        a, b = ours[first:last].max(), theirs[first:last].max()
        print(f"| {first + 1} to {last} | {exact[last - 1]:.4f} | {a:.1e} | {b:.1e} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
