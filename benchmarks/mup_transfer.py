"""The best learning rate at each width, with the standard parametrisation and with muP; see docs/mup.md.

    python benchmarks/mup_transfer.py docs/mup_transfer.png

Bytes of Python's documentation, 2 layers, AdamW with linear decay, 120 steps of 1,024 bytes; the loss is the mean of
the last 20 steps. About 5 minutes on one CPU core.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax import data, optim
from gptjax.distributed.parameters import parameter_info
from gptjax.nn import MuP, Parametrisation, Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch

WIDTHS = (32, 64, 128)
RATES = [2.0**-i for i in range(11, 4, -1)]
KINDS = {"standard": Parametrisation(), "muP": MuP(base_width=128)}
STEPS, ROWS, LENGTH = 120, 8, 128


def text() -> np.ndarray:
    """A few million bytes of documentation."""
    documents = itertools.islice(data.PyDocs().documents("train"), 400)
    return np.frombuffer("\n".join(document for document in documents if isinstance(document, str)).encode(), np.uint8)


def losses(kind: Parametrisation, width: int, text: np.ndarray) -> np.ndarray:
    """Mean training loss of the last 20 steps, nats per byte, at each learning rate."""
    config = TransformerConfig(vocab=256, layers=2, width=width, heads=width // 16, parametrisation=kind)
    model = Transformer(config)
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH - 1, (STEPS, ROWS, 1))
    rows = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
    ones = np.ones((STEPS, ROWS, LENGTH), np.int32)
    batches = Batch(rows[..., :-1], rows[..., 1:], ones.astype(np.float32), ones, np.cumsum(ones, -1, np.int32) - 1)

    info = parameter_info(model)

    @jax.jit
    def train(rate: jax.Array, batches: Batch) -> jax.Array:
        schedule = optim.Linear(warmup=10)
        optimizer = optax.chain(
            optim.AdamW(learning_rate=1.0, schedule=schedule).build(STEPS, info, config.width_multiplier),
            optax.scale(rate),
        )
        params = model.init(jax.random.key(0), batches.tokens[0])["params"]
        state = train_state.create(params, optimizer, jax.random.key(0))
        step = make_step(NextToken(), model.apply, optimizer)
        total, weight = jax.lax.scan(step, state, batches)[1]["loss"]
        return jnp.mean((total / weight)[-20:])

    return np.array([train(jnp.float32(rate), batches) for rate in RATES])


def picture(losses: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ink = "#444444"
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 2, sharey=True), losses.items(), strict=True):
        for i, (width, row) in enumerate(zip(WIDTHS, found, strict=True)):
            color = colormaps["viridis"](0.9 * (1 - i / (len(WIDTHS) - 1)))
            axes.plot(RATES, row, color=color, linewidth=1.8, label=f"width {width}")
            best = int(np.argmin(row))
            axes.plot(RATES[best], row[best], "o", color=color, markersize=7)
        axes.set_xscale("log", base=2)
        axes.set_ylim(top=min(3.6, axes.get_ylim()[1]))
        axes.set_title(name, loc="left", color=ink, fontweight="bold")
        axes.set_xlabel("peak learning rate", color=ink)
        axes.tick_params(colors=ink, length=0)
        axes.grid(color="#ececec")
        axes.spines[["top", "right"]].set_visible(False)
        if name == "standard":
            axes.set_ylabel("loss, nats per byte", color=ink)
            axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    path, found, corpus = Path(sys.argv[1]), {}, text()
    for name, kind in KINDS.items():
        print(f"{name}: the best learning rate and its loss, then the loss at each learning rate: {RATES}")
        rows = []
        for width in WIDTHS:
            rows.append(losses(kind, width, corpus))
            figures = " ".join(f"{x:.3f}" for x in rows[-1])
            print(
                f"  width {width:4}  {RATES[np.argmin(rows[-1])]:.5f}  {np.min(rows[-1]):.3f}    {figures}", flush=True
            )
        found[name] = np.array(rows)
    picture(found, path)


if __name__ == "__main__":
    main()
