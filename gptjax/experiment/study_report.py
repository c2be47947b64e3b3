"""Report of a study: a table of the figures with intervals over seeds or folds, the best settings, and a plot of all
curves and of the figure by what was swept."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.evals import intervals
from gptjax.experiment.report import INK, VALIDATION_LOSS, figures, find_figure
from gptjax.experiment.study import Outcome, Settings, Trial, label
from gptjax.monitor import metrics
from gptjax.types import UserError

Key = tuple[int | None, tuple[int, int] | None]
"""Seed and fold of a run, which runs of other settings are paired by."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The finished runs of one setting."""

    settings: Settings
    runs: dict[Key, tuple[Path, dict[str, float]]]
    """Seed and fold -> run folder and its figures."""

    def interval(self, figure: str) -> intervals.Interval | None:
        """Mean of a figure; runs with the same fold are a cluster. None: no run has it."""
        found = {key: figures[figure] for key, (_, figures) in self.runs.items() if figure in figures}
        if not found:
            return None
        clusters = [key[1] if key[1] is not None else key for key in found]
        return intervals.mean(list(found.values()), clusters)

    @property
    def name(self) -> str:
        return label(self.settings) or "the experiment"


def write(study: Path, trials: Sequence[Trial], figure: str | None, maximise: bool) -> list[str]:
    """Write `report/report.md` and the plot. Returns the findings, in a few lines.

    figure  to compare by. None: the validation loss of the last stage that has one
    """
    groups, failed = _groups(study, trials)
    lines = [f"# {study.name}\n"]
    known = list(dict.fromkeys(name for group in groups for _, found in group.runs.values() for name in found))
    findings = []
    if known:
        losses = [name for name in known if name.endswith(f"/{VALIDATION_LOSS}")]
        figure = find_figure(known, figure) if figure is not None else (losses or known)[-1]
        ranked = sorted(groups, key=lambda group: _order(group.interval(figure), maximise))
        findings = _best(ranked, figure, maximise)
        (study / "report").mkdir(parents=True, exist_ok=True)
        plot(groups, figure, study.name, study / "report" / "curves.png")
        lines += [*findings, "\n![curves of all runs](curves.png)\n", *_table(ranked, [figure, *known])]
        lines += ["\nIntervals have 95 % coverage, by Student's t over seeds or folds; the training texts of folds"]
        lines += ["overlap, so that theirs are somewhat too narrow.\n"]
    waiting = sum(Outcome.read(trial.folder(study)) is None for trial in trials)
    if waiting:
        findings.append(f"{waiting} of {len(trials)} runs have not ended")
    if failed:
        findings.append(f"{len(failed)} of {len(trials)} runs failed")
        lines += ["## Failures\n", "| run | exit code | |", "|---|---:|---|"]
        rows = [(folder.name, outcome.code, outcome.error.replace("|", "\\|")) for folder, outcome in failed]
        lines += [f"| {name} | {code} | {error} |" for name, code, error in rows]
    lines += [f"\n{waiting} of {len(trials)} runs have not ended."] if waiting else []
    (study / "report").mkdir(parents=True, exist_ok=True)
    (study / "report" / "report.md").write_text("\n".join(lines) + "\n")
    return findings


def _groups(study: Path, trials: Sequence[Trial]) -> tuple[list[Group], list[tuple[Path, Outcome]]]:
    """The finished runs by settings, and the outcomes of those that failed."""
    found: dict[tuple[tuple[str, str], ...], Group] = {}
    failed = []
    for trial in trials:
        folder = trial.folder(study)
        group = found.setdefault(tuple(trial.settings.items()), Group(trial.settings, {}))
        outcome = Outcome.read(folder)
        if outcome is not None and outcome.code == 0:
            group.runs[trial.seed, trial.fold] = folder, figures(folder)
        elif outcome is not None:
            failed.append((folder, outcome))
    return [group for group in found.values() if group.runs], failed


def _order(interval: intervals.Interval | None, maximise: bool) -> float:
    """Key to sort settings by, the best first. A value that is not finite is the worst."""
    if interval is None or not math.isfinite(interval.mean):
        return math.inf
    return -interval.mean if maximise else interval.mean


def _shown(interval: intervals.Interval | None) -> str:
    if interval is None:
        return ""
    if math.isinf(interval.high) or interval.n == 1:
        return f"{interval.mean:.4g}"
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _best(ranked: Sequence[Group], figure: str, maximise: bool) -> list[str]:
    """Findings: the best setting, and how sure it is that the next is worse."""
    best = ranked[0]
    interval = best.interval(figure)
    if interval is None:
        return [f"No run has {figure}."]
    lines = [f"{figure} of {best.name}: {_shown(interval)}, {interval.n} run{'s' * (interval.n > 1)}"]
    if len(ranked) == 1:
        return lines
    lines[0] = f"Best by {'highest' if maximise else 'lowest'} {lines[0]}"
    pairs = [
        (ranked[1].runs[key][1][figure], found[figure])
        for key, (_, found) in best.runs.items()
        if figure in found and key in ranked[1].runs and figure in ranked[1].runs[key][1]
    ]
    if len(pairs) < 2:
        lines.append(f"The next is {ranked[1].name}: {_shown(ranked[1].interval(figure))}; one run says nothing sure.")
        return lines
    gap = intervals.difference([worse for worse, _ in pairs], [better for _, better in pairs])
    sure = "the difference is beyond chance" if gap.p < 0.05 else "the difference may be chance"
    lines.append(
        f"The next is {ranked[1].name}: {gap.mean:+.4g} [{gap.low:.4g}, {gap.high:.4g}], "
        f"p = {gap.p:.2g} over {len(pairs)} pairs: {sure}."
    )
    return lines


def _table(groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    """Settings as rows, the best first, and figures as columns; of folds alone, figures as rows. Counts and what is the
    same in all runs are left out."""
    found = [figures for group in groups for _, figures in group.runs.values()]
    columns = {name: {figures[name] for figures in found if name in figures} for name in dict.fromkeys(names)}
    differ = {name for name, values in columns.items() if len(values) > 1 and not all(map(_is_count, values))}
    shown = [name for name in columns if name in differ or name == names[0]]
    folds = {key: figures for key, (_, figures) in groups[0].runs.items() if key[1] is not None}
    if len(groups) == 1 and folds:
        lines = [f"| figure | mean | {' | '.join(map(_key, folds))} |"]
        lines += [f"|---|---:|{'---:|' * len(folds)}"]
        for name in shown:
            cells = [f"{figures[name]:.4g}" if name in figures else "" for figures in folds.values()]
            lines.append(f"| {name} | {_shown(groups[0].interval(name))} | {' | '.join(cells)} |")
        return lines
    lines = [f"| setting | runs | {' | '.join(shown)} |", f"|---|---:|{'---:|' * len(shown)}"]
    for group in groups:
        cells = " | ".join(_shown(group.interval(name)) for name in shown)
        lines.append(f"| {group.name} | {len(group.runs)} | {cells} |")
    return lines


def _is_count(value: float) -> bool:
    return value > 1 and value == int(value)


def plot(groups: Sequence[Group], figure: str, title: str, path: Path) -> None:
    """Plot the losses of all runs by step and, of a sweep, the figure by the first option swept, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    swept = list(groups[0].settings) if len(groups) > 1 else []
    canvas = Figure(figsize=(11 if swept else 7.5, 4.4), dpi=150, layout="constrained")
    left, *right = canvas.subplots(1, 2 if swept else 1, squeeze=False)[0]
    stage = figure.partition("/")[0]
    colors = [colormaps["viridis"](0.9 * i / max(len(groups) - 1, 1)) for i in range(len(groups))]
    ends = []
    for group, color in zip(groups, colors, strict=True):
        for number, (key, (folder, _)) in enumerate(group.runs.items()):
            records = [record for record in metrics.read(folder) if record["stage"] == stage]
            for name, style in (("loss", ":"), (VALIDATION_LOSS, "-")):
                points = [(record["step"], record[name]) for record in records if name in record]
                if points and (name == VALIDATION_LOSS or not swept):
                    shown = group.name if swept else _key(key)
                    shown = shown if name == VALIDATION_LOSS and not (swept and number) else None
                    color = color if swept else f"C{number % 10}"
                    left.plot(*zip(*points, strict=True), style, color=color, linewidth=1.3, label=shown)
                ends += [value for _, value in points[len(points) // 4 :]]
    if ends:  # the first steps would hide the rest
        low, high = min(ends), max(ends)
        left.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    left.set_title("validation loss" if swept else "validation loss (lines) and training loss (dots)", **_HEAD)
    left.set_xlabel("step", color=INK)
    if 1 < (len(groups) if swept else len(groups[0].runs)) <= 10:
        left.legend(frameon=False, fontsize=8)
    if swept:
        _by_option(right[0], groups, figure, swept)
    for axes in (left, *right):
        axes.tick_params(colors=INK, length=0)
        axes.grid(color="#ececec")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(title, color=INK, fontweight="bold", x=0.01, ha="left")
    canvas.savefig(path)


def _key(key: Key) -> str:
    """Fold and seed of a run in words."""
    seed, fold = key
    parts = [] if fold is None else [f"fold {fold[0]}"]
    return ", ".join([*parts, *([] if seed is None else [f"seed {seed}"])]) or "run"


_HEAD: dict[str, Any] = {"loc": "left", "color": INK, "fontsize": 10}


def _by_option(axes: Any, groups: Sequence[Group], figure: str, swept: Sequence[str]) -> None:
    """Plot the figure by the first option, with intervals, as a line for each setting of the others."""
    option, *others = swept
    values = [group.settings[option] for group in groups]
    places = _places(values)
    series: dict[str, list[tuple[float, intervals.Interval]]] = {}
    for group, value in zip(groups, values, strict=True):
        if (interval := group.interval(figure)) is not None:
            rest = label({path: group.settings[path] for path in others})
            series.setdefault(rest, []).append((places[value], interval))
    for rest, points in series.items():
        points.sort(key=lambda point: point[0])
        x, found = zip(*points, strict=True)
        mean = [interval.mean for interval in found]
        spread = [0.0 if interval.n == 1 else interval.high - interval.mean for interval in found]
        axes.errorbar(x, mean, spread, marker="o", markersize=4, capsize=3, linewidth=1.3, label=rest or None)
    if any(not _is_number(value) for value in values):
        axes.set_xticks(list(places.values()), list(places))
    elif min(places.values()) > 0 and max(places.values()) >= 8 * min(places.values()):
        axes.set_xscale("log")
        axes.set_xticks(list(places.values()), list(places))
        axes.minorticks_off()
    axes.set_title(figure, **_HEAD)
    axes.set_xlabel(option, color=INK)
    if others and len(series) <= 10:
        axes.legend(frameon=False, fontsize=8)


def _places(values: Sequence[str]) -> dict[str, float]:
    """Place of each value on an axis: its number, or its rank if one is no number."""
    unique = list(dict.fromkeys(values))
    if all(map(_is_number, unique)):
        return {value: float(value) for value in unique}
    return dict(zip(unique, map(float, itertools.count()), strict=False))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def ranking(study: Path, trials: Sequence[Trial], figure: str | None) -> Mapping[tuple[tuple[str, str], ...], float]:
    """Settings -> mean of a figure, of those with a finished run."""
    found = {}
    for group in _groups(study, trials)[0]:
        known = list(next(iter(group.runs.values()))[1])
        losses = [name for name in known if name.endswith(f"/{VALIDATION_LOSS}")]
        try:
            name = find_figure(known, figure) if figure is not None else (losses or known)[-1]
        except (UserError, IndexError):
            continue
        if (interval := group.interval(name)) is not None:
            found[tuple(group.settings.items())] = interval.mean
    return found
