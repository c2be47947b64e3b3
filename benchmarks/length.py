"""Loss of each position encoding beyond its training length, as a markdown table and a plot.

    python benchmarks/length.py                                     # on the documentation that comes with Python
    python benchmarks/length.py input.txt --plot length.png         # on a text file, its last tenth held out

The same small model is trained once per encoding, on bytes, at 128 tokens, and then evaluated on held-out text in
pieces of 128, 256, 512 and 1,024. RoPE is also evaluated with its frequencies scaled by the length over 128, without
further training. About a minute per encoding on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptjax import data
from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402

from gptjax.distributed.parameters import parameter_info  # noqa: E402
from gptjax.kernels.cross_entropy import cross_entropy  # noqa: E402
from gptjax.nn import (  # noqa: E402
    ALiBi,
    LearnedPositions,
    LinearScaling,
    NTKScaling,
    Positions,
    RoPE,
    Sinusoidal,
    T5Bias,
    Transformer,
    TransformerConfig,
    YaRN,
)
from gptjax.objectives import NextToken  # noqa: E402
from gptjax.optim import Linear, Muon  # noqa: E402
from gptjax.train.state import create  # noqa: E402
from gptjax.train.step import make_step  # noqa: E402
from gptjax.types import Array, Batch, Params  # noqa: E402

TRAINED, LENGTHS = 128, (128, 256, 512, 1_024)
BIN = 64
"""Tokens per point of the plot."""
CONFIG = TransformerConfig(vocab=256, layers=4, width=128, heads=4, embedding_scale=128**0.5)
"""Embeddings are scaled as in "Attention Is All You Need"; otherwise sinusoids would dominate them."""
ENCODINGS: dict[str, Positions] = {
    "none": Positions(),
    "Sinusoidal": Sinusoidal(),
    "LearnedPositions": LearnedPositions(TRAINED),
    "RoPE": RoPE(),
    "ALiBi": ALiBi(),
    "T5Bias": T5Bias(),
}
SCALED: dict[str, Callable[[float], RoPE]] = {
    "RoPE, LinearScaling": lambda factor: RoPE(scaling=LinearScaling(factor)),
    "RoPE, NTKScaling": lambda factor: RoPE(scaling=NTKScaling(factor)),
    "RoPE, YaRN": lambda factor: RoPE(scaling=YaRN(factor, TRAINED)),
}
"""Name -> encoding with which a trained RoPE is evaluated, by the ratio of the length to the training length."""


def read(path: Path | None, split: data.Split) -> np.ndarray:
    """The text as bytes, int32."""
    source = data.PyDocs() if path is None else data.Text(str(path))
    return np.frombuffer("".join(source.documents(split)).encode(), np.uint8).astype(np.int32)


def train(positions: Positions, text: np.ndarray, steps: int, rows: int) -> Params:
    """Train for `steps` steps on `rows` random pieces of the text each. Every encoding gets the same pieces."""
    model = Transformer(dataclasses.replace(CONFIG, positions=positions))
    optimizer = Muon(learning_rate=5e-3, schedule=Linear(warmup=min(20, steps))).build(steps, parameter_info(model))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, TRAINED), np.int32))["params"]
    state = create(params, optimizer, jax.random.key(1))
    step = make_step(NextToken(), model.apply, optimizer)
    random = np.random.default_rng(0)
    ones = np.ones((rows, TRAINED), np.int32)
    places = np.broadcast_to(np.arange(TRAINED, dtype=np.int32), ones.shape)
    for _ in range(steps):
        starts = random.integers(len(text) - TRAINED, size=rows)
        pieces = text[starts[:, None] + np.arange(TRAINED + 1)]
        state, _ = step(state, Batch(pieces[:, :-1], pieces[:, 1:], ones.astype(np.float32), ones, places))
    return state.params


def losses(positions: Positions, params: Params, text: np.ndarray, length: int) -> np.ndarray:
    """Loss of each token in nats, [pieces, length], with the text split into pieces of this length."""
    model = Transformer(dataclasses.replace(CONFIG, positions=positions))

    @jax.jit
    def nats(tokens: Array) -> Array:
        logits, _ = model.apply({"params": params}, tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:])[0]

    rows = max(1, 4_096 // length)
    whole = len(text) // max(LENGTHS) * max(LENGTHS)
    pieces = np.stack([text[start : start + length + 1] for start in range(0, whole, length)])
    return np.concatenate([nats(pieces[i : i + rows]) for i in range(0, len(pieces), rows)])


def measure(path: Path | None, steps: int, rows: int, held_out: int) -> dict[str, dict[int, np.ndarray]]:
    """Encoding -> length -> loss of each token in nats [pieces, length]. Prints a row of the table for each."""
    text, unseen = read(path, "train"), read(path, "validation")[: held_out + 1]
    results: dict[str, dict[int, np.ndarray]] = {}

    def report(name: str, params: Params, at: Callable[[int], Positions]) -> None:
        lengths = [n for n in LENGTHS if n <= (at(n).max_positions or n)]
        results[name] = {n: losses(at(n), params, unseen, n) for n in lengths}
        cells = [f"{results[name][n].mean():.3f}" if n in lengths else "–" for n in LENGTHS]
        cells += [f"{results[name][n][:, TRAINED:].mean():.3f}" if n in lengths else "–" for n in LENGTHS[1:]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    beyond = " | ".join(f"{n:,}, beyond {TRAINED}" for n in LENGTHS[1:])
    print(f"| positions | {' | '.join(f'{n:,}' for n in LENGTHS)} | {beyond} |")
    print("|---|" + "---:|" * (2 * len(LENGTHS) - 1), flush=True)
    for name, positions in ENCODINGS.items():
        params = train(positions, text, steps, rows)
        report(name, params, lambda _, positions=positions: positions)
        if isinstance(positions, RoPE):
            for scaled, rope in SCALED.items():
                report(scaled, params, lambda n, rope=rope: rope(n / TRAINED))
    return results


def plot(results: dict[str, dict[int, np.ndarray]], path: Path) -> None:
    """Plot the loss by position in the longest pieces that each encoding supports, as a PNG."""
    from matplotlib.figure import Figure

    ink = "#444444"
    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ends = []
    for i, (name, found) in enumerate(results.items()):
        loss = found[max(found)].mean(0).reshape(-1, BIN).mean(1)
        places = (np.arange(len(loss)) + 0.5) * BIN
        color = f"C{i}"
        axes.plot(places, loss, color=color, linewidth=1.8, linestyle="--" if name in SCALED else "-")
        ends.append([loss[-1], loss[-1], places[-1], name, color])
    axes.axvline(TRAINED, color="#b0b0b0", linewidth=1)
    bottom, top = axes.get_ylim()
    # Label the ends of the lines without overlap.
    ends.sort(key=lambda end: end[0])
    for below, above in itertools.pairwise(ends):
        if above[2] == below[2]:
            above[1] = max(above[1], below[1] + (top - bottom) / 24)
    for loss, height, place, name, color in ends:
        if place < max(LENGTHS) - BIN:  # other lines go on past this end: put the label above it
            height += (top - bottom) / 24
        axes.annotate(name, (place, loss), (place + 20, height), color=color, va="center", annotation_clip=False)
    axes.text(TRAINED + 8, top, f"trained up to {TRAINED}", color=ink, va="top")
    axes.set_title("Reading further than the training length", loc="left", color=ink, fontweight="bold", pad=12)
    axes.set_xlabel("position in the text, tokens", color=ink)
    axes.set_ylabel("loss, nats per token", color=ink)
    axes.set_xlim(0, max(LENGTHS))
    axes.set_ylim(bottom, top)
    axes.set_xticks(LENGTHS)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(colors=ink, length=0)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a text file (default: the documentation of Python)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default 300)")
    parser.add_argument("--batch", type=int, default=8, help="pieces per step (default 8)")
    parser.add_argument("--held-out", type=int, default=32_768, help="bytes of held-out text (default 32,768)")
    parser.add_argument("--plot", type=Path, help="file of the plot (default: no plot)")
    arguments = parser.parse_args()
    results = measure(arguments.text, arguments.steps, arguments.batch, arguments.held_out)
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
