"""Report of a run: loss curves, text samples, results of evaluations. `report/report.md` in the run folder has relative
links, so that the folder can be moved."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gptjax.monitor import metrics, times
from gptjax.types import Result

Records = list[dict[str, Any]]
"""Lines of metrics.jsonl."""
TRAINING, VALIDATION, INK = "#4878a8", "#d1581b", "#444444"


def write(folder: Path, results: dict[str, list[Result]], units: Mapping[str, str]) -> None:
    """Write `folder/report/report.md` and a PNG for each stage, from the run's metrics.jsonl and these results.

    units  unit of each stage's mean loss: "token" (default), "text"
    """
    target = folder / "report"
    target.mkdir(exist_ok=True)
    lines = [f"# {folder.name}\n"]
    all_records = metrics.read(folder)
    for stage, found in results.items():
        records = [record for record in all_records if record["stage"] == stage]
        curve(records, f"{folder.name}: {stage}", target / f"{stage}.png", units.get(stage, "token"))
        picture = f"\n![loss curves of {stage}]({quote(stage)}.png)\n"
        lines += [f"## {stage}\n", _summary(records, units.get(stage, "token")), *_speed(records), picture]
        for result in found:
            lines += [f"### {result.title}\n", result.markdown, ""]
        lines += _samples(records)
    (target / "report.md").write_text("\n".join(lines))


def curve(records: Records, title: str, path: Path, unit: str = "token") -> None:
    """Plot training and validation loss by step as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, loss = _column(records, "loss")
    axes.plot(steps, loss, color=TRAINING, linewidth=0.8, alpha=0.3)
    curves = [("training", TRAINING, "", steps, _smooth(loss))]
    curves += [("validation", VALIDATION, "o", *_column(records, "validation_loss"))]
    curves = sorted((curve for curve in curves if len(curve[-1])), key=lambda curve: curve[-1][-1])
    for name, color, marker, steps, loss in curves:
        axes.plot(steps, loss, color=color, linewidth=2, marker=marker, markersize=4)
        # Curves are labelled at their end, the lower one below it, to avoid overlap.
        text, end, place = f"{name} {loss[-1]:.3f}", (steps[-1], loss[-1]), "top" if name == curves[0][0] else "bottom"
        axes.annotate(text, end, (8, 0), textcoords="offset points", color=color, va=place, annotation_clip=False)
    axes.set_title(title, loc="left", color=INK, fontweight="bold", pad=12)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(f"loss, nats a {unit}", color=INK)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a twentieth of the values, or fewer at the ends."""
    around = np.ones(2 * (len(values) // 40) + 1)
    if not len(values):
        return values
    return np.convolve(values, around, "same") / np.convolve(np.ones(len(values)), around, "same")


def _column(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _summary(records: Records, unit: str) -> str:
    steps, loss = _column(records, "validation_loss")
    if not len(steps):
        return "No validation loss."
    best = int(np.argmin(loss))
    return (
        f"{int(steps[-1]):,} steps. Validation loss **{loss[-1]:.4f}** nats a {unit} at the end; "
        f"the lowest was {loss[best]:.4f}, at step {int(steps[best]):,}."
    )


def _speed(records: Records) -> list[str]:
    """Speed, breakdown of time, and maximum memory, as a line of Markdown."""
    timed = [record for record in records if record.get("time_step")]
    if not timed:
        return []
    steps = np.diff([0, *(record["step"] for record in timed)])

    def total(name: str) -> float:
        return float(np.dot([record.get(f"time_{name}", 0.0) for record in timed], steps))

    spent = {name: total(name) for name in (*times.TRAINING, *times.BESIDE)}
    shares = sorted(((seconds / sum(spent.values()), name) for name, seconds in spent.items()), reverse=True)
    tokens = float(np.dot([record["tokens_per_second"] * record["time_step"] for record in timed], steps))
    parts = [f"{tokens / total('step'):,.0f} tokens a second"]
    if "mfu" in timed[-1]:
        parts.append(f"model-FLOPs utilisation {np.median([record['mfu'] for record in timed if 'mfu' in record]):.1%}")
    parts.append("time: " + ", ".join(f"{name} {share:.1%}" for share, name in shares if share >= 0.0005))
    for name, what in (("memory_device", "on a device"), ("memory_process", "in the process")):
        if used := max((record.get(name, 0) for record in records), default=0):
            parts.append(f"at most {used / 2**30:.2f} GiB {what}")
    return [f"\nSpeed: {'; '.join(parts)}."]


def _samples(records: Records) -> list[str]:
    """First and last text sample, as Markdown."""
    samples = [record for record in records if "sample" in record]
    lines = ["### Samples\n"] if samples else []
    for record in samples[:1] + samples[1:][-1:]:
        lines += [f"After {record['step']:,} steps:\n", textwrap.indent(record["sample"].strip("\n"), "    "), ""]
    return lines
