"""The report of a run: loss curves as pictures and the evaluations; `report/report.md` in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.evals.result import Result

TRAIN, VALIDATION = "#9db4c8", "#c1440e"


def write(folder: Path, results: dict[str, list[Result]]) -> None:
    """Write `folder/report/report.md` and a PNG for each stage, from the run's metrics.jsonl and these results."""
    target = folder / "report"
    target.mkdir(exist_ok=True)
    lines = [f"# {folder.name}\n"]
    metrics = read_metrics(folder / "metrics.jsonl")
    for stage, rows in metrics.items():
        curve(rows, f"{folder.name}: {stage}", target / f"{stage}.png")
        lines += [f"## {stage}\n", _summary(rows), f"\n![loss curves of {stage}]({stage}.png)\n"]
        for result in results.get(stage, []):
            lines += [f"### {result.title}\n", result.markdown, ""]
    lines += ["## Next\n", f"    gptjax chat {folder.name}", f'    gptjax generate {folder.name} --prompt "..."', ""]
    (target / "report.md").write_text("\n".join(lines))


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage -> its lines of metrics.jsonl, in order."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        stages.setdefault(row["stage"], []).append(row)
    return stages


def curve(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Training and validation loss by step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    steps, loss = _column(rows, "loss")
    window = max(1, len(loss) // 50)
    axes.plot(steps, loss, color=TRAIN, linewidth=0.7, alpha=0.6)
    if len(loss) >= window:
        smooth = np.convolve(loss, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color=TRAIN, linewidth=1.8, label="training")
    steps, loss = _column(rows, "validation_loss")
    axes.plot(steps, loss, color=VALIDATION, linewidth=1.8, marker="o", markersize=3, label="validation")
    axes.set(title=title, xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _column(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _summary(rows: list[dict[str, Any]]) -> str:
    steps, loss = _column(rows, "validation_loss")
    if not len(steps):
        return "No validation loss yet."
    best = int(np.argmin(loss))
    return (
        f"{int(steps[-1]):,} steps. Validation loss **{loss[-1]:.4f}** nats a token at the end; "
        f"the lowest was {loss[best]:.4f}, at step {int(steps[best]):,}."
    )
