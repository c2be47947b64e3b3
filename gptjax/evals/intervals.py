"""Means with confidence intervals, and paired differences of two models.

Items that share something, a passage or a prompt that was sampled several times, form a cluster, and only clusters
count as independent. With n items in G clusters, mean m and residuals x_i - m, the standard error is

    SE^2 = G / (G - 1) * sum_c (sum_{i in c} (x_i - m))^2 / n^2

(Miller 2024, arXiv:2411.00640), and the interval m +- t * SE has Student's t with G - 1 degrees of freedom. Shares of
items that are right or wrong, one in a cluster, have Wilson's interval (1927), which also holds for few items and near
0 and 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from gptjax.types import UserError

LEVEL = 0.95
"""Coverage of an interval."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of items."""
    clusters: int
    """Number of independent clusters of them."""

    def __format__(self, spec: str) -> str:
        """Mean, interval and n; `spec` formats the numbers: f"{interval:.1%}" -> "52.0% [48.9%, 55.1%], n = 1,000"."""
        count = f"n = {self.n:,}" + (f" in {self.clusters:,} clusters" if self.clusters < self.n else "")
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}], {count}"


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """Mean of paired differences, and the probability of one as large if there is none."""

    p: float
    """Two-sided p-value: McNemar's exact test for right and wrong items, one in a cluster, else Student's t-test."""


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = LEVEL) -> Interval:
    """Mean of values, one of each item, with its interval.

    clusters  the cluster of each item. None: all differ

    Raises UserError without items. One cluster alone says nothing about others: its interval is infinite."""
    x, groups = _arrays(values, clusters)
    m, n, count = float(x.mean()), len(x), int(groups.max()) + 1
    if count == n and np.isin(x, (0, 1)).all():
        return Interval(m, *_wilson(m, n, level), n, count)
    half = _student(count, level) * _standard_error(x, groups, count)
    if half == 0 and np.isin(x, (0, 1)).all():  # all are right, or all wrong: no residuals to learn from
        return Interval(m, *_wilson(m, count, level), n, count)
    return Interval(m, m - half, m + half, n, count)


def difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = LEVEL
) -> Difference:
    """Mean of a - b, two models' values of the same items. Raises UserError if their numbers differ."""
    from scipy import stats

    if len(a) != len(b):
        raise UserError(f"items: got {len(a)} and {len(b)}, must be the same items to be compared")
    x, groups = _arrays(np.subtract(a, b, dtype=np.float64), clusters)
    m, n, count = float(x.mean()), len(x), int(groups.max()) + 1
    se = _standard_error(x, groups, count)
    half = _student(count, level) * se
    if count == n and np.isin([a, b], (0, 1)).all():
        better, differing = int((x > 0).sum()), int((x != 0).sum())
        p = float(stats.binomtest(better, differing).pvalue) if differing else 1.0
    elif se == 0 or count == 1:
        p = 1.0 if m == 0 or count == 1 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(m) / se, count - 1))
    return Difference(m, m - half, m + half, n, count, p)


def _arrays(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the number of the cluster of each."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise UserError("items: got none, must be at least one")
    if clusters is None:
        return x, np.arange(len(x))
    if len(clusters) != len(x):
        raise UserError(f"clusters: got {len(clusters)}, must be {len(x)}, one of each item")
    numbers: dict[Hashable, int] = {}
    return x, np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])


def _standard_error(x: np.ndarray, groups: np.ndarray, count: int) -> float:
    if count == 1:
        return math.inf
    sums = np.bincount(groups, x - x.mean())
    return math.sqrt(count / (count - 1) * float(sums @ sums)) / len(x)


def _student(count: int, level: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, max(count - 1, 1)))


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    from scipy import stats

    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
