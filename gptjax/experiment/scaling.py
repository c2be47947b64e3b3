"""Scaling laws: fit the loss of a series of runs by size and tokens, and choose both for a budget of compute.

With N parameters and D tokens, Hoffmann et al. 2022 (arXiv:2203.15556, approach 3) fit

    L(N, D) = E + A / N^alpha + B / D^beta

by the Huber loss of log L. With training compute C = k N D FLOPs, k of the runs (about 6), the lowest loss is at

    N = G (C / k)^(beta / (alpha + beta)),  D = (C / k) / N,  G = (alpha A / (beta B))^(1 / (alpha + beta)).

In a series where one dial sets both, N and D grow together and their effects cannot be told apart. Then the law is

    L(C) = E + K / C^gamma,

and N and D for a budget are those of the dial, by a power law of C.

Intervals are those of a bootstrap of the residuals (Efron 1979), which are scaled by sqrt(n / (n - p)) for p fitted
numbers: they hold if the law does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.types import UserError

HUBER = 1e-3
"""Residual of log L from which on it counts linearly, as in Hoffmann et al."""
LEVEL = 0.95
"""Coverage of the intervals."""
TOGETHER = 0.99
"""Correlation of log N and log D from which on a series counts as of one dial."""


@dataclasses.dataclass(frozen=True)
class Series:
    """A series of runs, float64 [n] each."""

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    losses: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise UserError(f"runs: got {field.name} of {values.min():g}, must be finite and positive")

    @property
    def one_dial(self) -> bool:
        """True if parameters and tokens grow together."""
        logs = np.log(self.parameters), np.log(self.tokens)
        return min(map(np.ptp, logs)) < 1e-9 or abs(np.corrcoef(*logs)[0, 1]) > TOGETHER


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law."""

    one_dial: bool
    values: np.ndarray
    """Fitted numbers [p]: log E, log A, alpha, log B, beta; of one dial log E, log K, gamma."""
    samples: np.ndarray
    """Those of the bootstrap [s, p]."""
    series: Series
    dial: np.ndarray
    """Slope and intercept of log N by log C, of one dial."""

    @property
    def exponents(self) -> dict[str, int]:
        """Name -> place in `values`."""
        return {"gamma": 2} if self.one_dial else {"alpha": 2, "beta": 4}

    def interval(self, of: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
        """A number that follows from the fit, with the bounds of its interval."""
        found = [of(values) for values in self.samples]
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return of(self.values), float(low), float(high)

    def optimum(self, values: np.ndarray, flops: float) -> tuple[float, float, float]:
        """Parameters, tokens and loss of the best run of a budget, by these fitted numbers."""
        n, d = self.series.parameters, self.series.tokens
        product = flops / float(np.exp(np.mean(np.log(self.series.flops / (n * d)))))
        if self.one_dial:
            parameters = float(np.exp(self.dial[0] * np.log(flops) + self.dial[1]))
            return parameters, product / parameters, self._loss(values, [flops])
        _, log_a, alpha, log_b, beta = values
        log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
        parameters = float(np.exp(log_g + beta / (alpha + beta) * np.log(product)))
        tokens = product / parameters
        return parameters, tokens, self._loss(values, [parameters, tokens])

    @staticmethod
    def _loss(values: np.ndarray, sizes: Sequence[float]) -> float:
        return float(np.exp(_log_loss(values, np.log(sizes)[:, None])[0]))


def fit(series: Series, samples: int = 200, seed: int = 0) -> Fit:
    """Fit the law of a series, with a bootstrap of so many samples. Raises UserError for too few runs."""
    one_dial = series.one_dial
    x = np.log([series.flops] if one_dial else [series.parameters, series.tokens])
    count, needed = len(series.losses), 3 if one_dial else 5
    sizes = len(np.unique(series.flops))
    if min(count, sizes) <= needed:
        together = "size and tokens grow together" if one_dial else "size and tokens vary freely"
        raise UserError(f"runs: got {count} of {sizes} sizes, must be at least {needed + 1} where {together}")
    target = np.log(series.losses)
    best, _ = min((_solve(x, target, start) for start in _starts(series, x)), key=lambda found: found[1])
    fitted = _log_loss(best, x)
    residuals = (target - fitted) * np.sqrt(count / (count - needed))
    rng = np.random.default_rng(seed)
    drawn = [_solve(x, fitted + rng.choice(residuals - residuals.mean(), count), best)[0] for _ in range(samples)]
    dial = np.polyfit(np.log(series.flops), np.log(series.parameters), 1) if one_dial else np.zeros(2)
    return Fit(one_dial, best, np.array(drawn), series, dial)


def _terms(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Logarithms of the law's terms [1 + k, n], for logarithms x [k, n] of k sizes: log E, log A_i - alpha_i x_i."""
    powers = values[1::2, None] - values[2::2, None] * x
    return np.concatenate([np.full((1, x.shape[1]), values[0]), powers])


def _log_loss(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log L [n]."""
    return np.logaddexp.reduce(_terms(values, x), axis=0)


def _gradient(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Derivative of log L by the values [n, 1 + 2 k]."""
    terms = _terms(values, x)
    shares = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
    found = np.empty((1 + 2 * len(x), x.shape[1]))
    found[0], found[1::2], found[2::2] = shares[0], shares[1:], -shares[1:] * x
    return found.T


def _solve(x: np.ndarray, target: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Fitted numbers of the least Huber loss of log L, from a start, and that loss. Sizes are centred, so that factors
    and exponents can be told apart."""
    from scipy.optimize import least_squares

    centre = x.mean(1)
    x, start = x - centre[:, None], start.copy()
    start[1::2] -= start[2::2] * centre
    low, high = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    low[0], low[2::2], high[2::2] = -20.0, 1e-3, 3.0
    found = least_squares(
        lambda values: (_log_loss(values, x) - target) / HUBER,
        np.clip(start, low + 1e-6, high - 1e-6),
        jac=lambda values: _gradient(values, x) / HUBER,  # pyright: ignore[reportArgumentType] (its stubs lack it)
        bounds=(low, high),
        loss="huber",
        x_scale="jac",
        max_nfev=1_000,
    )
    values = found.x.copy()
    values[1::2] += values[2::2] * centre
    return values, float(found.cost)


def _starts(series: Series, x: np.ndarray) -> list[np.ndarray]:
    """Values to start from: constants and exponents on a grid, with factors that divide the rest of the mean loss."""
    found = []
    for share, *powers in itertools.product((0.3, 0.8), *[(0.1, 0.3, 0.6)] * len(x)):
        e = share * float(series.losses.min())
        rest = np.log((float(series.losses.mean()) - e) / len(x))
        factors = [(rest + power * row.mean(), power) for power, row in zip(powers, x, strict=True)]
        found.append(np.array([np.log(e), *itertools.chain(*factors)]))
    return found


def report(found: Fit, budgets: Sequence[float]) -> str:
    """The law, its exponents and the best run for each budget, with intervals, as lines of text."""
    law = "L(C) = E + K / C^gamma" if found.one_dial else "L(N, D) = E + A / N^alpha + B / D^beta"
    count = len(found.series.losses)
    lines = [f"{law}, fitted to {count} runs; in brackets {LEVEL:.0%} intervals"]
    if found.one_dial:
        lines.append("size and tokens grow together in these runs: their effects cannot be told apart")
    for name, place in found.exponents.items():
        lines.append(f"  {name:8} {_bounds(found.interval(lambda values, place=place: float(values[place])), '.3f')}")
    lines.append(f"  {'E':8} {_bounds(found.interval(lambda values: float(np.exp(values[0]))), '.3f')}")
    top = float(found.series.flops.max())
    for flops in budgets:
        choice = [found.interval(lambda values, i=i, flops=flops: found.optimum(values, flops)[i]) for i in range(3)]
        shown = [_bounds(choice[0], ".3g"), _bounds(choice[1], ".3g"), _bounds(choice[2], ".3f")]
        if found.one_dial:
            shown[:2] = [f"{choice[0][0]:.3g}", f"{choice[1][0]:.3g}"]  # of the dial, not fitted to losses
        far = f"; {flops / top:.3g} times the largest run" if flops > top else ""
        lines.append(f"{flops:.3g} FLOPs: {shown[0]} parameters, {shown[1]} tokens, loss {shown[2]}{far}")
    return "\n".join(lines)


def _bounds(interval: tuple[float, float, float], spec: str) -> str:
    value, low, high = interval
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def plot(found: Fit, budgets: Sequence[float], path: Path) -> None:
    """Plot losses by compute with the best loss of each budget, and the best size by compute, as a PNG."""
    from matplotlib.figure import Figure

    from gptjax.experiment.report import INK, TRAINING, VALIDATION

    series = found.series
    reach = [*series.flops, *budgets]
    grid = np.geomspace(min(reach) / 1.5, max(reach) * 1.5, 40)
    curves = [np.array([found.interval(lambda v, c=c, i=i: found.optimum(v, c)[i]) for c in grid]).T for i in (2, 0)]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, curve, points, name in (
        (left, curves[0], series.losses, "loss, nats"),
        (right, curves[1], series.parameters, "parameters"),
    ):
        axes.fill_between(grid, curve[1], curve[2], color=VALIDATION, alpha=0.2, linewidth=0)
        axes.plot(grid, curve[0], color=VALIDATION, label="best run of a budget, by the law")
        axes.plot(series.flops, points, "o", color=TRAINING, markersize=4, label="runs")
        for flops in budgets:
            axes.axvline(flops, color="#a0a0a0", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs", color=INK)
        axes.set_title(name, loc="left", color=INK, fontsize=10)
        axes.tick_params(colors=INK, which="both", length=0)
        axes.grid(color="#ececec", which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.2g}")
    left.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
