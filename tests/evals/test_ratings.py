"""Ratings recover known strengths, equal another implementation's, and judges' biases are measured."""

import choix
import numpy as np
import pytest

from gptjax.evals.ratings import (
    ELO,
    Vote,
    agreement,
    bradley_terry,
    krippendorff,
    left_share,
    longer_share,
    ratings,
    verdicts,
    win_rate,
)
from gptjax.types import UserError


def drawn(strengths: dict[str, float], items: int, seed: int, left_bias: float = 0.0) -> list[Vote]:
    """Votes of one judge on every pair, by the model's own probabilities."""
    draw, votes, names = np.random.default_rng(seed), [], sorted(strengths)
    for item in range(items):
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                left, right = (a, b) if draw.random() < 0.5 else (b, a)
                p = 1 / (1 + np.exp(strengths[right] - strengths[left] - left_bias))
                votes.append(Vote(str(item), left, right, "left" if draw.random() < p else "right", "j"))
    return votes


def test_strengths_are_those_of_choix():
    draw = np.random.default_rng(0)
    wins = draw.integers(0, 9, (5, 5)) * (1 - np.eye(5, dtype=int))
    games = [(i, j) for i in range(5) for j in range(5) for _ in range(wins[i, j])]
    expected = choix.opt_pairwise(5, games, alpha=0.01)
    np.testing.assert_allclose(bradley_terry(wins.astype(float)), expected - expected.mean(), atol=1e-5)


def test_intervals_hold_the_true_ratings():
    true = {"a": 0.0, "b": 0.4, "c": -0.6}
    held, centre = [], np.mean(list(true.values()))
    for seed in range(40):
        for rating in ratings(verdicts(drawn(true, 80, seed)), resamples=200):
            held.append(rating.low <= 1_000 + ELO * (true[rating.model] - centre) <= rating.high)
    # 120 draws, a third of them independent: the standard deviation of 95 % is below 3.5 %.
    assert np.mean(held) > 0.85


def test_a_model_that_always_wins_has_a_finite_rating_and_ties_are_halves():
    always = verdicts([Vote(str(i), "a", "b", "left", "j") for i in range(20)])
    best, worst = ratings(always)
    assert best.model == "a"
    assert 1_000 < best.rating < 3_000
    assert (best.wins, worst.wins) == (20, 0)
    tied = verdicts([Vote("1", "a", "b", "tie", "j"), Vote("2", "a", "b", "both bad", "j")])
    assert [rating.rating for rating in ratings(tied)] == pytest.approx([1_000, 1_000])
    assert win_rate(tied, "b", "a").mean == 0.5


def test_a_judge_that_changes_its_mind_with_the_order_says_tie():
    both = [Vote("1", "a", "b", "left", "j"), Vote("1", "b", "a", "left", "j")]
    (verdict,) = verdicts(both)
    assert verdict.outcome == 0.5
    assert left_share(both).mean == 1
    again = [*both, Vote("1", "b", "a", "right", "j")]
    assert verdicts(again)[0].outcome == 1, "the last vote in an order counts"


def test_bias_of_position_and_length_is_measured():
    biased = left_share(drawn({"a": 0.0, "b": 0.0}, 400, 1, left_bias=1.0))
    assert biased.low < 1 / (1 + np.exp(-1)) < biased.high
    assert biased.low > 0.5
    fair = drawn({"a": 0.0, "b": 1.0}, 400, 2)
    assert left_share(fair).low < 0.5 < left_share(fair).high
    lengths = {(str(i), model): 10 + (model == "b") for i in range(400) for model in "ab"}
    wins = win_rate(verdicts(fair), "b", "a")
    assert longer_share(fair, lengths).mean == pytest.approx(wins.mean)


def test_agreement_is_krippendorffs_alpha():
    """His own example for nominal data with gaps: 0.691, Computing Krippendorff's Alpha-Reliability (2011), C."""
    coders = [
        [None, None, None, None, None, 3, 4, 1, 2, 1, 1, 3, 3, None, 3],
        [1, None, 2, 1, 3, 3, 4, 3, None, None, None, None, None, None, None],
        [None, None, 2, 1, 3, 4, 4, None, 2, 1, 1, 3, 3, None, 4],
    ]
    units = [[value for value in unit if value is not None] for unit in zip(*coders, strict=True)]
    assert krippendorff(units) == pytest.approx(0.691, abs=5e-4)
    assert agreement(verdicts([Vote("1", "a", "b", "left", "x")])) is None


def test_what_cannot_be_rated_is_said():
    apart = verdicts([Vote("1", "a", "b", "left", "j"), Vote("1", "c", "d", "left", "j")])
    for call in (lambda: ratings([]), lambda: ratings(apart), lambda: Vote("1", "a", "a", "left", "j")):
        with pytest.raises(UserError, match="must"):
            call()
