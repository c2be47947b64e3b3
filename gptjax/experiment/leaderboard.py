"""Leaderboard: a static page of runs with their sizes, times, figures and curves, in one file that needs no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from gptjax.experiment.report import VALIDATION_LOSS, find_figure
from gptjax.experiment.summary import Curve, Summary
from gptjax.monitor.times import duration
from gptjax.types import UserError

WIDTH, HEIGHT = 160, 40
"""Size of a curve, in pixels."""
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#222, #ddd); --soft: light-dark(#777, #999);
        --line: light-dark(#e3e3e3, #3a3a3a); --paper: light-dark(#fff, #1b1b1b);
        --curve: light-dark(#d1581b, #f08a4b) }
body { margin: 2rem auto; max-width: 96vw; width: max-content; font: 15px/1.45 system-ui, sans-serif;
       color: var(--ink); background: var(--paper) }
p { color: var(--soft); max-width: 46rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
th { vertical-align: bottom; font-weight: 600 }
th button { all: unset; cursor: pointer; white-space: pre }
th button:focus-visible { outline: 2px solid var(--curve) }
th[aria-sort] button::after { content: " ▲"; color: var(--curve) }
th[aria-sort=descending] button::after { content: " ▼" }
td.best { font-weight: 700 } small { color: var(--soft) }
svg { vertical-align: middle } svg polyline { fill: none; stroke: var(--curve); stroke-width: 1.5 }
"""
SCRIPT = """
const body = document.querySelector("tbody");
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.closest("th"), column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.value;
  const number = text => text === "" ? NaN : Number(text);
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b), p = number(x), q = number(y);
    if (x === "" || y === "") return (x === "") - (y === "");  // empty cells stay last
    return (isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q) * (up ? 1 : -1);
  }).forEach(row => body.append(row));
}));
"""


def page(runs: Sequence[Summary], figure: str | None = None) -> str:
    """The page, as HTML. Runs are sorted by a figure, the lowest first.

    figure  an ending of its name that no other has. None: the validation loss of the last stage

    Raises UserError for a figure that no run has."""
    known = list(dict.fromkeys(name for run in runs for name in run.figures))
    losses = [name for name in known if name.endswith(f"/{VALIDATION_LOSS}")]
    if not known:
        raise UserError("runs: got none with a figure, must be at least one with a validation loss or an evaluation")
    order = find_figure(known, figure) if figure is not None else (losses or known)[-1]
    shown = [name for name in known if not _is_count([run.figures.get(name) for run in runs])]
    shown = [order, *(name for name in shown if name != order)]
    best = {name: min(run.figures[name] for run in runs if name in run.figures) for name in losses}
    ranked = sorted(runs, key=lambda run: (_rank(run.figures.get(order)), run.name))
    curves = [curve for run in runs if (curve := _last(run))]
    bounds = _bounds(curves)
    heads = ["model", "parameters", "tokens", "FLOPs", "time", *shown]
    head = "".join(_head(text, ' aria-sort="ascending"' if text == order else "") for text in heads)
    rows = "\n".join(_row(run, shown, best, bounds) for run in ranked)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{STYLE}</style></head><body>
<h1>Leaderboard</h1>
<p>{len(runs)} run{"s" * (len(runs) != 1)}. Click a column to sort by it. Curves: validation loss of the last stage,
on one scale{_scale(bounds)}. The lowest validation loss of each stage is bold.</p>
<div class="scroll"><table><thead><tr>{_head("run", "")}<th>validation loss</th>{head}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
<script>{SCRIPT}</script></body></html>
"""


def _head(text: str, sorted_: str) -> str:
    where, _, name = text.rpartition("/")
    inside = f"<small>{html.escape(where)}</small>\n{html.escape(name)}" if where else html.escape(text)
    return f'<th scope="col"{sorted_}><button type="button">{inside}</button></th>'


def _row(run: Summary, shown: Sequence[str], best: dict[str, float], bounds: tuple[float, float] | None) -> str:
    numbers = [run.parameters, run.total("tokens"), run.total("flops")]
    cells = [_cell(run.model, html.escape(run.model))]
    cells += [_cell(number, "" if number is None else _short(number)) for number in numbers]
    seconds = run.total("seconds")
    cells.append(_cell(seconds, "" if seconds is None else duration(seconds)))
    for name in shown:
        value = run.figures.get(name)
        kind = ' class="best"' if value is not None and best.get(name) == value else ""
        cells.append(_cell(value, "" if value is None else f"{value:.4g}", kind))
    first = _cell(run.name, html.escape(run.name)) + f"<td>{_svg(_last(run), bounds)}</td>"
    return f"<tr>{first}{''.join(cells)}</tr>"


def _cell(value: object, text: str, kind: str = "") -> str:
    return f'<td data-value="{"" if value is None else html.escape(str(value))}"{kind}>{text}</td>'


def _last(run: Summary) -> Curve:
    """Curve of the last stage that has one."""
    return next((stage.curve for stage in reversed(run.stages.values()) if stage.curve), [])


def _bounds(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Lowest and highest loss, but for the first quarter of each curve, which would hide the rest."""
    losses = [loss for curve in curves for _, loss in curve[len(curve) // 4 :] if math.isfinite(loss)]
    return (min(losses), max(losses)) if losses else None


def _scale(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" from {bounds[0]:.3g} to {bounds[1]:.3g}"


def _svg(curve: Curve, bounds: tuple[float, float] | None) -> str:
    """A curve as inline SVG."""
    points = [(step, loss) for step, loss in curve if math.isfinite(loss)]
    if not points or bounds is None:
        return ""
    low, high = bounds
    last = max(points[-1][0], 1)

    def place(step: int, loss: float) -> str:
        fraction = (loss - low) / (high - low) if high > low else 0.5
        return f"{2 + (WIDTH - 4) * step / last:.1f},{HEIGHT - 3 - (HEIGHT - 6) * min(max(fraction, 0), 1):.1f}"

    label = f"validation loss from {points[0][1]:.3g} to {points[-1][1]:.3g} in {points[-1][0]:,} steps"
    line = " ".join(place(*point) for point in points)
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{line}"/></svg>'
    )


def _rank(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _is_count(values: Sequence[float | None]) -> bool:
    found = [value for value in values if value is not None]
    return all(value > 1 and value == int(value) for value in found if math.isfinite(value))


def _short(number: float) -> str:
    for size, unit in ((1e12, None), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number:.2e}" if unit is None else f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
