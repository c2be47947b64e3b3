"""Coordinate check of muP: independence of the activations' size from the width.

A few steps are trained at several widths, on one batch of random tokens, with the standard parametrisation and with muP
(`nn/parametrisation.py`). For a learning rate that transfers between widths, neither the initial size of activations
nor their change per step may grow with the width (Yang et al. 2022, arXiv:2203.03466, appendix D.1).

    python -m experiments quickstart --coordinates
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gptjax.distributed.parameters import parameter_info
from gptjax.nn import MultiHeadLatentAttention, MuP, Parametrisation, Transformer, TransformerConfig, activations
from gptjax.objectives import NextToken
from gptjax.optim import Constant
from gptjax.protocols import Optimizer
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, Key, UserError

Sizes = dict[str, np.ndarray]
"""Name of an activation, as in `nn.activations` -> float [widths, steps + 1]: mean of |x| before the first step, then
mean change |x - x before| after each step."""


def resize(config: TransformerConfig, width: int) -> TransformerConfig:
    """Resize a model in width: the same depth and head size, more heads, and latents in proportion. Raises UserError if
    the number of heads is not whole."""
    heads, kv_heads = config.heads * width, config.K * width
    if heads % config.width or kv_heads % config.width:
        raise UserError(
            f"width: got {width}, must be a multiple of {config.width // np.gcd(config.heads, config.K)}, "
            "for a whole number of heads"
        )
    attention = config.attention
    if isinstance(attention, MultiHeadLatentAttention):
        ranks = {"q_rank": attention.q_rank, "kv_rank": attention.kv_rank}
        ranks = {name: rank and max(rank * width // config.width, 1) for name, rank in ranks.items()}
        attention = dataclasses.replace(attention, **ranks)
    return dataclasses.replace(
        config,
        width=width,
        attention=attention,
        heads=heads // config.width,
        kv_heads=None if config.kv_heads is None else kv_heads // config.width,
        head_size=config.H,
        hidden=None if config.hidden is None else config.hidden * width // config.width,
    )


def coordinates(
    config: TransformerConfig,
    optimizer: Optimizer,
    widths: Sequence[int],
    steps: int = 5,
    batch: int = 4,
    length: int = 64,
    seed: int = 0,
) -> Sizes:
    """Sizes of the model's activations at these widths, over a few steps at the optimizer's learning rate."""
    measured = [_measure(resize(config, width), optimizer, steps, batch, length, seed) for width in widths]
    return {name: np.array([sizes[name] for sizes in measured]) for name in measured[0]}


def _measure(
    config: TransformerConfig, optimizer: Optimizer, steps: int, batch: int, length: int, seed: int
) -> dict[str, list[float]]:
    model = Transformer(config)
    tokens = np.random.default_rng(seed).integers(0, config.vocab, (batch, length + 1), np.int32)
    ones, positions = np.ones((batch, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    examples = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)
    update = optimizer.with_schedule(Constant()).build(steps, parameter_info(model), config.width_multiplier)

    def create(key: Key) -> train_state.State:
        return train_state.create(model.init(key, examples.tokens)["params"], update, key)

    state = jax.jit(create)(jax.random.key(seed))
    step = make_step(NextToken(), model.apply, update)
    inspect = jax.jit(lambda params: activations(model, params, examples.tokens))
    initial = jax.device_get(inspect(state.params))
    sizes = {name: [float(np.mean(np.abs(x)))] for name, x in initial.items()}
    for _ in range(steps):
        state, _ = step(state, examples)
        for name, x in jax.device_get(inspect(state.params)).items():
            sizes[name].append(float(np.mean(np.abs(x - initial[name]))))
    return sizes


def width_exponents(widths: Sequence[int], sizes: np.ndarray) -> np.ndarray:
    """Exponent of the width in sizes [widths, steps + 1], [steps + 1]: the slope of a log-log fit. 0: independent of
    width."""
    return np.polyfit(np.log(widths), np.log(np.maximum(sizes, 1e-30)), 1)[0]


def check(
    config: TransformerConfig,
    optimizer: Optimizer,
    path: Path,
    widths: Sequence[int] | None = None,
    steps: int = 5,
) -> str:
    """Compare the standard parametrisation with muP. Writes a plot, and returns a table of the exponents of the width
    in the activations' initial size, and in their change after the last step."""
    widths = _widths(config) if widths is None else widths
    mup = config.parametrisation
    if not isinstance(mup, MuP):
        mup = MuP(base_width=widths[0])
    measured = {
        name: coordinates(dataclasses.replace(config, parametrisation=parametrisation), optimizer, widths, steps)
        for name, parametrisation in (("standard", Parametrisation()), ("muP", mup))
    }
    picture(measured, widths, f"{type(optimizer).__name__}, learning rate {optimizer.learning_rate:g}", path)
    lines = [
        f"exponent of the width in the size of activations ({', '.join(map(str, widths))}):",
        f"{'':18}{'initial size':^24}{f'change in {steps} steps':^24}",
        f"{'':18}" + f"{'standard':>12}{'muP':>12}" * 2,
    ]
    for name in sorted(
        measured["muP"], key=lambda name: (not name.startswith("layer_"), len(name.split("/")[0]), name)
    ):
        powers = [width_exponents(widths, sizes[name]) for sizes in measured.values()]
        lines.append(f"{name:18}" + "".join(f"{power[i]:12.2f}" for i in (0, -1) for power in powers))
    return "\n".join([*lines, f"plot: {path}"])


def _widths(config: TransformerConfig) -> tuple[int, ...]:
    """Four widths, doubling from 64 or from the minimum for this model."""
    narrow = int(config.width // np.gcd(config.heads, config.K))
    first = -(-64 // narrow) * narrow
    return tuple(first * 2**i for i in range(4))


def picture(measured: dict[str, Sizes], widths: Sequence[int], title: str, path: Path) -> None:
    """Plot sizes by width as a PNG, one line per step, one row per parametrisation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    any_sizes = next(iter(measured.values()))
    last = max(int(name[6:]) for name in any_sizes if name.startswith("layer_") and name[6:].isdigit())
    names = {
        f"layer_{last}/attention": "attention, last block",
        f"layer_{last}/mlp": "MLP, last block",
        f"layer_{last}": "residual stream, end",
        "logits": "logits",
    }
    names = {name: label for name, label in names.items() if name in any_sizes}  # a recurrent model has no MLP
    ink = "#444444"
    figure = Figure(figsize=(10, 2.9 * len(measured)), dpi=150, layout="constrained")
    grid = figure.subplots(len(measured), len(names), sharex=True, sharey="col", squeeze=False)
    for row, (kind, sizes) in zip(grid, measured.items(), strict=True):
        for axes, (name, label) in zip(row, names.items(), strict=True):
            steps = sizes[name].shape[1]
            for step in range(steps):
                color = "#a0a0a0" if step == 0 else colormaps["viridis"](0.9 * (1 - step / (steps - 1)))
                style = {"linestyle": "--"} if step == 0 else {}
                text = "initial size" if step == 0 else f"change after {step} step{'s' * (step > 1)}"
                axes.plot(widths, sizes[name][:, step], color=color, label=text, marker="o", markersize=3, **style)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.minorticks_off()
            axes.tick_params(colors=ink, length=0)
            axes.grid(color="#ececec")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(label if axes in grid[0] else "", color=ink, fontsize=10)
        row[0].set_ylabel(f"{kind}\nmean of |x|", color=ink)
    for axes in grid[-1]:
        axes.set_xlabel("width", color=ink)
    figure.suptitle(title, color=ink, fontweight="bold", x=0.01, ha="left")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
