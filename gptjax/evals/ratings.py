"""Ratings of models from pairwise votes: Bradley-Terry strengths, agreement of judges, bias of position and length.

Model i beats model j with probability 1 / (1 + 10^((R_j - R_i) / 400)): Elo's scale (Bradley and Terry 1952). A tie is
half a win for each. The ratings maximise the likelihood of the votes, with a weak Gaussian prior that keeps those of a
model that always wins finite; their mean is 1,000.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import numpy as np

from gptjax.evals.intervals import LEVEL, Interval, mean
from gptjax.types import UserError

Choice = Literal["left", "right", "tie", "both bad"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both bad")
ELO = 400 / np.log(10)
"""Points of Elo's scale per unit of log-odds."""
MEAN = 1_000.0
"""Mean rating."""
PRIOR = 0.01
"""Weight of the squared strengths, in log-odds, beside the negative log-likelihood."""
RESAMPLES = 500
"""Number of bootstrap samples of an interval."""


@dataclasses.dataclass(frozen=True)
class Vote:
    """A judge's choice between the replies of two models to one prompt."""

    item: str
    """The prompt."""
    left: str
    """Name of the model whose reply was shown on the left, or first."""
    right: str
    """Name of the other model."""
    choice: Choice
    """The better reply."""
    judge: str
    """Name of the judge."""

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise UserError(f"choice: got {self.choice!r}, must be one of {', '.join(CHOICES)}")
        if self.left == self.right:
            raise UserError(f"right: got {self.right}, must be another model than the left one")

    @property
    def pair(self) -> tuple[str, str]:
        """The two models, in alphabetical order."""
        return (self.left, self.right) if self.left < self.right else (self.right, self.left)

    @property
    def outcome(self) -> float:
        """1 if the first model of `pair` won, 0 if the second did, else 1/2."""
        if self.choice not in ("left", "right"):
            return 0.5
        return float((self.choice == "left") == (self.left == self.pair[0]))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Opinion of a judge on a pair of replies, over all orders in which they were shown: a tie if these disagree."""

    item: str
    pair: tuple[str, str]
    judge: str
    outcome: float
    """As in `Vote`."""


def latest(votes: Iterable[Vote]) -> list[Vote]:
    """The votes that count: the last one of each judge on a pair of replies in one order."""
    return list({(vote.item, vote.left, vote.right, vote.judge): vote for vote in votes}.values())


def verdicts(votes: Iterable[Vote]) -> list[Verdict]:
    """One verdict per judge, item and pair."""
    seen: dict[tuple[str, tuple[str, str], str], set[float]] = defaultdict(set)
    for vote in latest(votes):
        seen[vote.item, vote.pair, vote.judge].add(vote.outcome)
    return [
        Verdict(item, pair, judge, outcomes.pop() if len(outcomes) == 1 else 0.5)
        for (item, pair, judge), outcomes in seen.items()
    ]


@dataclasses.dataclass(frozen=True)
class Rating:
    """Rating of a model with its bootstrap interval."""

    model: str
    rating: float
    low: float
    high: float
    wins: float
    """Number of verdicts for it; a tie is half a one."""
    verdicts: int
    """Number of verdicts on it."""


def ratings(found: Sequence[Verdict], resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> list[Rating]:
    """Ratings of all models, the best first. The intervals resample items: votes on one prompt are not independent.

    Raises UserError without verdicts, and for models that no chain of comparisons connects."""
    if not found:
        raise UserError("votes: got none, must be at least one")
    models = sorted({model for verdict in found for model in verdict.pair})
    numbers = {model: number for number, model in enumerate(models)}
    items = {item: number for number, item in enumerate(dict.fromkeys(verdict.item for verdict in found))}
    wins = np.zeros((len(items), len(models), len(models)))  # wins[t, i, j]: of model i over model j on item t
    for verdict in found:
        i, j = (numbers[model] for model in verdict.pair)
        wins[items[verdict.item], i, j] += verdict.outcome
        wins[items[verdict.item], j, i] += 1 - verdict.outcome
    total = wins.sum(0)
    _check_connected(models, total + total.T > 0)
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(len(items), np.full(len(items), 1 / len(items)), resamples)
    drawn = np.tensordot(counts, wins, 1)
    strengths = MEAN + ELO * bradley_terry(np.concatenate([total[None], drawn]))
    low, high = np.quantile(strengths[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    won, played = total.sum(1), (total + total.T).sum(1)
    made = [
        Rating(model, float(strengths[0, i]), float(low[i]), float(high[i]), float(won[i]), int(played[i]))
        for i, model in enumerate(models)
    ]
    return sorted(made, key=lambda rating: -rating.rating)


def bradley_terry(wins: np.ndarray, prior: float = PRIOR, steps: int = 100) -> np.ndarray:
    """Strengths in log-odds, [..., M], with mean 0, of win counts [..., M, M]: `wins[i, j]` of model i over j.

    Minimises -sum_ij wins_ij log sigmoid(s_i - s_j) + prior * sum_i s_i^2 by Newton's method: it is strictly convex."""
    m = wins.shape[-1]
    strengths = np.zeros(wins.shape[:-1])
    games = wins + np.swapaxes(wins, -1, -2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., None]))  # of i over j
        gradient = 2 * prior * strengths - (wins - games * p).sum(-1)
        weight = games * p * (1 - p)
        hessian = -weight + np.eye(m) * (weight.sum(-1)[..., None] + 2 * prior)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step /= np.maximum(1, np.abs(step).max(-1, keepdims=True))  # far from the minimum, no longer than 1
        strengths = strengths - step
        if np.abs(step).max() < 1e-10:
            break
    return strengths - strengths.mean(-1, keepdims=True)


def win_rate(found: Sequence[Verdict], model: str, other: str) -> Interval:
    """Share of verdicts for `model` against `other`, clustered by item; a tie is half a win."""
    pair = (model, other) if model < other else (other, model)
    mine = [verdict for verdict in found if verdict.pair == pair]
    values = [verdict.outcome if pair[0] == model else 1 - verdict.outcome for verdict in mine]
    share = mean(values, [verdict.item for verdict in mine])
    return dataclasses.replace(share, low=max(share.low, 0.0), high=min(share.high, 1.0))


def agreement(found: Sequence[Verdict]) -> float | None:
    """Krippendorff's alpha (nominal) of the judges: 1 if all agree, 0 as by chance. None: no pair of replies has two
    judges."""
    units: dict[Hashable, list[float]] = defaultdict(list)
    for verdict in found:
        units[verdict.item, verdict.pair].append(verdict.outcome)
    return krippendorff([values for values in units.values() if len(values) > 1])


def krippendorff(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values, one list per unit: 1 - D_observed / D_expected. None: no unit has two
    values, or all values are equal, so that nothing could differ."""
    units = [values for values in units if len(values) > 1]
    kinds = sorted({value for values in units for value in values}, key=repr)
    if len(kinds) < 2:
        return None
    observed, totals = 0.0, np.zeros(len(kinds))
    for values in units:
        counts = np.array([sum(value == kind for value in values) for kind in kinds], float)
        observed += (len(values) ** 2 - counts @ counts) / (len(values) - 1)
        totals += counts
    n = totals.sum()
    expected = (n * n - totals @ totals) / (n - 1)
    return float(1 - observed / expected)


def left_share(votes: Sequence[Vote]) -> Interval | None:
    """Share of decided votes for the reply on the left: 1/2 without a bias. None: there are none."""
    decided = [vote for vote in votes if vote.choice in ("left", "right")]
    if not decided:
        return None
    return mean([float(vote.choice == "left") for vote in decided], [vote.item for vote in decided])


def longer_share(votes: Sequence[Vote], length: dict[tuple[str, str], int]) -> Interval | None:
    """Share of decided votes for the longer reply. None: there are none, or all lengths are equal.

    length  number of characters of the reply to each (item, model)"""
    values, items = [], []
    for vote in votes:
        left, right = (length[vote.item, model] for model in (vote.left, vote.right))
        if vote.choice in ("left", "right") and left != right:
            values.append(float((vote.choice == "left") == (left > right)))
            items.append(vote.item)
    return mean(values, items) if values else None


def _check_connected(models: Sequence[str], met: np.ndarray) -> None:
    reached = {0}
    while more := {int(j) for i in reached for j in np.flatnonzero(met[i])} - reached:
        reached |= more
    if len(reached) < len(models):
        apart = ", ".join(model for i, model in enumerate(models) if i not in reached)
        raise UserError(f"votes: got none that connect {models[0]} with {apart}, must compare every model with others")
