"""Confidence intervals cover what they promise, and equal published values."""

import numpy as np
import pytest
from scipy import stats

from gptjax.evals.intervals import difference, mean
from gptjax.types import UserError


def test_intervals_of_clustered_items_cover_and_naive_ones_do_not():
    """Items in 40 clusters of 10 with a common effect: 95 % of intervals hold the true mean, if clusters are known."""
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 10)
    held = np.zeros(2)
    for _ in range(1_000):
        values = draw.normal(0, 1, 40)[clusters] + draw.normal(0, 1, 400)
        for i, interval in enumerate((mean(values, list(clusters)), mean(values))):
            held[i] += interval.low <= 0 <= interval.high
    # 1,000 draws of 95 % have a standard deviation of 0.7 %.
    assert abs(held[0] / 1_000 - 0.95) < 0.03
    assert held[1] / 1_000 < 0.7


def test_a_cluster_per_item_is_the_t_interval():
    values = np.random.default_rng(1).normal(3, 2, 17)
    found = mean(values)
    low, high = stats.t.interval(0.95, 16, values.mean(), stats.sem(values))
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)


def test_repeating_every_item_adds_no_information():
    values = list(np.random.default_rng(2).random(20))
    once, thrice = mean(values), mean(values * 3, [*range(20)] * 3)
    np.testing.assert_allclose([once.low, once.high], [thrice.low, thrice.high], rtol=1e-12)
    assert (thrice.n, thrice.clusters) == (60, 20)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (50, 100), (100, 100)])
def test_shares_have_wilsons_interval(right, n):
    found = mean([1.0] * right + [0.0] * (n - right))
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=1e-12)


def test_certainty_is_never_claimed_of_few():
    assert mean([1.0] * 6, [0, 0, 0, 1, 1, 1]).low < 0.5
    assert mean([1.0, 0.0], [0, 0]).low == -np.inf


def test_pairs_are_compared_exactly_and_beat_separate_intervals():
    draw = np.random.default_rng(3)
    hard = draw.random(400)
    a, b = (hard < 0.55).astype(float), (hard < 0.5).astype(float)  # b is right only where a is
    found = difference(a, b)
    better = int((a > b).sum())
    assert found.p == pytest.approx(2 * 0.5**better)
    assert found.low > 0
    assert mean(a).low < mean(b).high, "their own intervals overlap"
    reverse = difference(b, a)
    assert (reverse.mean, reverse.p) == (pytest.approx(-found.mean), found.p)


def test_differences_of_measures_are_the_paired_t_test():
    draw = np.random.default_rng(4)
    a, b = draw.normal(0.3, 1, 30), draw.normal(0, 1, 30)
    assert difference(list(a), list(b)).p == pytest.approx(float(stats.ttest_rel(a, b).pvalue))
    assert difference([1.0, 2.0], [1.0, 2.0], ["x", "x"]).p == 1
    assert difference([2.5, 1.5, 3.5], [1.5, 1.5, 2.5]).p == pytest.approx(
        float(stats.ttest_rel([2.5, 1.5, 3.5], [1.5, 1.5, 2.5]).pvalue)
    ), "differences of 0 and 1 of measures are no counts of right answers"


def test_what_is_wrong_is_said():
    for call in (lambda: mean([]), lambda: difference([1.0], [1.0, 0.0]), lambda: mean([1.0], [1, 2])):
        with pytest.raises(UserError, match="must be"):
            call()
    assert f"{mean([1.0, 0.0] * 50):.1%}" == "50.0% [40.4%, 59.6%], n = 100"
