"""Advantages equal published values and the plain recursion, and tokens that nobody chose change none."""

import numpy as np
import pytest

from gptjax.objectives.advantages import generalised_advantages, relative_rewards, whiten

EIGHT, ONE_GROUP = np.float32([1, 1, 1, 0, 0, 0, 0, 0]), np.zeros(8, np.int32)


@pytest.mark.parametrize(
    ("baseline", "deviation", "right", "wrong"),
    [("group", "group", 1.2076, -0.7246), ("group", "none", 0.625, -0.375), ("leave_one_out", "none", 0.7143, -0.4286)],
)
def test_three_right_replies_of_eight(baseline, deviation, right, wrong):
    """Values published for 8 samples, 3 of them right."""
    found = relative_rewards(EIGHT, ONE_GROUP, baseline, deviation, epsilon=0)
    np.testing.assert_allclose(found, np.where(EIGHT > 0, right, wrong), atol=1e-4)


def test_groups_do_not_see_one_another():
    rewards, groups = np.float32([1, 0, 5, 7, 9, 3, 100]), np.int32([0, 0, 1, 1, 1, 2, -1])
    found = relative_rewards(rewards, groups, "group", "none")
    np.testing.assert_allclose(found, [0.5, -0.5, -2, 0, 2, 0, 0], atol=1e-6)
    batch = relative_rewards(rewards, groups, "none", "batch", epsilon=0)
    np.testing.assert_allclose(batch[:6], rewards[:6] / np.std(rewards[:6], ddof=1), rtol=1e-5)
    assert batch[6] == 0


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("deviation", ["group", "batch", "none"])
def test_a_deviation_that_is_a_rounding_error_counts_as_zero(baseline, deviation):
    equal = relative_rewards(np.full(7, 0.1, np.float32), np.zeros(7, np.int32), baseline, deviation)
    assert not np.any(equal)
    residue = relative_rewards(np.float32([0.1, 0.1 + 1e-7, 0.1]), np.zeros(3, np.int32), baseline, deviation)
    assert np.abs(residue).max() < 1e-6


def plain(rewards, values, weights, last, gamma, lam):
    """The recursion over the chosen tokens of one reply, in numpy."""
    chosen, made = np.flatnonzero(weights), np.zeros(len(weights))
    later, following = 0.0, last
    for t in chosen[::-1]:
        later = rewards[t] + gamma * following - values[t] + gamma * lam * later
        made[t], following = later, values[t]
    return made


def test_estimates_equal_the_recursion_over_chosen_tokens():
    draw = np.random.default_rng(0)
    rewards, values = draw.normal(size=(2, 5, 9)).astype(np.float32)
    weights, last = (draw.random((5, 9)) < 0.6).astype(np.float32), draw.normal(size=5).astype(np.float32)
    found, returns = generalised_advantages(rewards, values, weights, last, 0.9, 0.8)
    expected = [plain(*row, 0.9, 0.8) for row in zip(rewards, values, weights, last, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, (found + values) * weights, atol=1e-6)


def test_tokens_of_tools_and_padding_change_no_advantage():
    """Whitening included: the same replies with tokens inserted everywhere."""
    draw = np.random.default_rng(1)
    rewards, values = draw.normal(size=(2, 3, 4)).astype(np.float32)
    last, ones = np.float32([0, 1, 2]), np.ones((3, 4), np.float32)
    places = np.array([1, 3, 4, 7])

    def insert(x):
        wide = draw.normal(size=(3, 10)).astype(np.float32) * 100
        wide[:, places] = x
        return wide

    weights = np.zeros((3, 10), np.float32)
    weights[:, places] = 1
    narrow = generalised_advantages(rewards, values, ones, last, 0.9, 0.95)
    wide = generalised_advantages(insert(rewards), insert(values), weights, last, 0.9, 0.95)
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b[:, places], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whiten(narrow[0], ones), whiten(wide[0], weights)[:, places], rtol=1e-5, atol=1e-6)


def test_published_values_with_a_masked_token():
    """Rewards 1, 2, 3 have returns 6, 5, 3, whitened over the first and the last."""
    rewards, zeros = np.float32([[1, 2, 3]]), np.zeros((1, 3), np.float32)
    _, returns = generalised_advantages(rewards, zeros, np.ones((1, 3), np.float32), np.zeros(1), 1.0, 1.0)
    np.testing.assert_allclose(returns, [[6, 5, 3]])
    found = whiten(returns, np.float32([[1, 0, 1]]))
    np.testing.assert_allclose(found, [[0.7071, 0, -0.7071]], atol=1e-4)
