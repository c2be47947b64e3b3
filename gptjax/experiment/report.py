"""Report of a run: loss curves, text samples, results of evaluations. `report/report.md` in the run folder has relative
links, so that the folder can be moved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gptjax.monitor import metrics, times
from gptjax.types import Result, UserError

VALIDATION_LOSS = "validation_loss"
Records = list[dict[str, Any]]
"""Lines of metrics.jsonl."""
TRAINING, VALIDATION, INK = "#4878a8", "#d1581b", "#444444"


@dataclasses.dataclass(frozen=True)
class Expect:
    """Expected result of an experiment: bounds of a figure. The report says whether it holds, and
    `python -m experiments check NAME` runs the experiment again and says it."""

    figure: str
    """Figure of the report, as STAGE/validation_loss or STAGE/EVALUATION/NAME, or an ending of it that no other has,
    such as bits_per_byte."""
    below: float | None = None
    """Upper bound, excluded. None: none."""
    above: float | None = None
    """Lower bound, excluded. None: none."""

    def __post_init__(self):
        if self.above is None and self.below is None:
            raise UserError(f"expect: got no bound of {self.figure}, must be below, above or both")

    def __str__(self) -> str:
        bounds = {"above": self.above, "below": self.below}
        return f"{self.figure} {' and '.join(f'{name} {x:g}' for name, x in bounds.items() if x is not None)}"

    def holds(self, value: float) -> bool:
        """True if the value is within the bounds; NaN is not."""
        above = self.above is None or value > self.above
        return not math.isnan(value) and above and (self.below is None or value < self.below)


def figures(folder: Path) -> dict[str, float]:
    """Figures of a run, by name: STAGE/validation_loss, of the stage's last checkpoint, with the objective's other
    metrics, and STAGE/EVALUATION/NAME of each value of each evaluation. Raises UserError for a folder without a run."""
    try:
        stages = json.loads((folder / "config.json").read_bytes())["experiment"]["stages"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"run: got {folder}, must be a run folder, with a config.json") from None
    records, found = metrics.read(folder), {}
    for stage, config in stages.items():
        lines = [line for line in records if line["stage"] == stage and VALIDATION_LOSS in line]
        if lines:
            early = config.get("early_stopping") is not None
            kept = min(lines, key=lambda line: line[VALIDATION_LOSS]) if early else lines[-1]
            found |= {f"{stage}/{name}": value for name, value in kept.items() if name.startswith("validation_")}
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            for result in json.loads((folder / "report" / f"{stage}.json").read_bytes())["results"]:
                found |= {f"{stage}/{result['title']}/{name}": value for name, value in result["values"].items()}
    return found


def find_figure(known: Iterable[str], name: str) -> str:
    """Full name of a figure, given in full or by an ending that no other has. Raises UserError."""
    names = list(known)
    found = [full for full in names if f"/{full}".endswith(f"/{name}")]
    if len(found) != 1:
        wrong = f"could be {' or '.join(found)}" if found else f"must be one of: {', '.join(names) or 'none yet'}"
        raise UserError(f"figure: got {name}, {wrong}")
    return found[0]


def check(folder: Path, expected: Iterable[Expect]) -> list[tuple[Expect, float, bool]]:
    """(expectation, measured value, whether it holds) for each. A figure that the run lacks is NaN and does not
    hold."""
    expected = list(expected)
    measured = figures(folder) if expected else {}
    values = [(expect, _value(measured, expect.figure)) for expect in expected]
    return [(expect, value, expect.holds(value)) for expect, value in values]


def verdict(expect: Expect, value: float, holds: bool) -> str:
    """Line about an expectation."""
    measured = "not measured" if math.isnan(value) else f"{value:.4g}"
    return f"{expect}: {'holds' if holds else 'DOES NOT HOLD'} ({measured})"


def _value(measured: Mapping[str, float], name: str) -> float:
    try:
        return measured[find_figure(measured, name)]
    except UserError:
        return math.nan


def write(
    folder: Path, results: dict[str, list[Result]], units: Mapping[str, str], expected: Iterable[Expect] = ()
) -> None:
    """Write `folder/report/report.md` and a PNG for each stage, from the run's metrics.jsonl and these results, which
    are stored.

    units  unit of each stage's mean loss: "token" (default), "text", "pair"
    """
    target = folder / "report"
    target.mkdir(exist_ok=True)
    lines = [f"# {folder.name}\n"]
    all_records, time_lines = metrics.read(folder), metrics.read_wall(folder)
    wall = times.WallTime(time_lines)
    failures = {"a failure an hour": 3_600.0, "one a day": 86_400.0, "one a week": 604_800.0}
    if number := wall.counts["down"]:
        failures |= {f"as many as here, one every {times.duration(wall.total / number)}": wall.total / number}
    for stage, found in results.items():
        records = [record for record in all_records if record["stage"] == stage]
        curve(records, f"{folder.name}: {stage}", target / f"{stage}.png", units.get(stage, "token"))
        picture = f"\n![loss curves of {stage}]({quote(stage)}.png)\n"
        saving = _saving(records, times.WallTime(x for x in time_lines if x.get("stage") == stage), failures)
        lines += [f"## {stage}\n", _summary(records, units.get(stage, "token")), *_speed(records), *saving, picture]
        if any("outcome" in record for record in records):  # of replies that the model wrote
            from gptjax.experiment.rollout_curves import rollout_curves

            rollout_curves(records, f"{folder.name}: {stage}", target / f"{stage}_rollouts.png")
            lines.append(f"![rollouts of {stage}]({quote(stage)}_rollouts.png)\n")
        for result in found:
            lines += [f"### {result.title}\n", result.markdown, ""]
        lines += _samples(records)
    if checked := check(folder, expected):
        lines += ["## Expected results\n", *(f"- {verdict(*one)}" for one in checked), ""]
    lines += _wall_time(wall)
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


WALL_TIME = {
    "steps": "steps that count (goodput)",
    "lost": "steps repeated after a kill or rolled back",
    "start": "start-up and compilation",
    "restore": "restoring checkpoints",
    "input": "waiting for input",
    "evaluation": "validation, samples, evaluations",
    "checkpoint": "saving checkpoints",
    "local_checkpoint": "saving local checkpoints",
    "commit": "waiting for the last checkpoint",
    "down": "no process running",
}


def _wall_time(wall: times.WallTime) -> list[str]:
    """Table of the wall time by part, as Markdown."""
    rows = [("wall time", wall.total), *((what, wall.parts[part]) for part, what in WALL_TIME.items())]
    table = [
        f"| {what} | {times.duration(spent)} | {spent / wall.total:.1%} |" for what, spent in rows if spent >= 0.05
    ]
    return ["## Time\n", "| | | share |\n|---|---:|---:|", *table, ""] if wall.total else []


def _saving(records: Records, wall: times.WallTime, failures: Mapping[str, float]) -> list[str]:
    """Cost of a checkpoint of a stage, and the `save_every` that loses the least time, as a line of Markdown; and of a
    local one.

    wall      of the stage
    failures  rate of failures in words -> mean time between them, in seconds"""
    speeds, lines = [record["time_step"] for record in records if record.get("time_step")], []
    step = float(np.median(speeds or [1.0]))
    for part, option in {"checkpoint": "save_every", "local_checkpoint": "save_local_every"}.items():
        if not (saves := wall.counts[part]) or not speeds:
            continue
        cost, what = wall.parts[part] / saves, part.replace("_", " ")
        best = ", ".join(
            f"{max(round(times.save_interval(cost, mean) / step), 1):,} with {rate}" for rate, mean in failures.items()
        )
        lines.append(
            f"\nSaving: {saves:,} {what}s, each of which blocked training for {times.duration(cost)}. "
            f"The `{option}` that loses the least time: {best}."
        )
    return lines


def _samples(records: Records) -> list[str]:
    """First and last text sample, as Markdown."""
    samples = [record for record in records if "sample" in record]
    lines = ["### Samples\n"] if samples else []
    for record in samples[:1] + samples[1:][-1:]:
        lines += [f"After {record['step']:,} steps:\n", textwrap.indent(record["sample"].strip("\n"), "    "), ""]
    return lines
