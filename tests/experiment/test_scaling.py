"""Laws of the scaling fits: of losses from a known law with noise, they find its exponents within their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from gptjax.cli import run
from gptjax.cli.main import main
from gptjax.experiment import scaling
from gptjax.experiment.dial import Dial
from gptjax.types import UserError

E, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28  # Hoffmann et al. 2022


def chinchilla(noise: float, seed: int, sizes: int = 6, ratios: int = 5) -> scaling.Series:
    n = np.repeat(np.geomspace(1e7, 3e9, sizes), ratios)
    d = n * np.tile(np.geomspace(2, 200, ratios), sizes)
    losses = (E + A / n**ALPHA + B / d**BETA) * np.exp(noise * np.random.default_rng(seed).normal(size=n.size))
    return scaling.Series(n, d, 6 * n * d, losses)


def one_dial(noise: float, seed: int) -> scaling.Series:
    n = np.geomspace(1e6, 1e9, 12)
    flops = 6 * n * 20 * n
    losses = (1.5 + 200 / flops**0.14) * np.exp(noise * np.random.default_rng(seed).normal(size=n.size))
    return scaling.Series(n, 20 * n, flops, losses)


def test_without_noise_the_law_is_found():
    found = scaling.fit(chinchilla(0.0, 0), samples=2)
    np.testing.assert_allclose(np.exp(found.values[[0, 1, 3]]), [E, A, B], rtol=0.02)
    np.testing.assert_allclose(found.values[[2, 4]], [ALPHA, BETA], rtol=2e-3)
    best = min(
        (E + A / n**ALPHA + B / (1e22 / 6 / n) ** BETA, n) for n in np.geomspace(1e8, 1e12, 4_001)
    )  # by search, not by the formula
    parameters, tokens, loss = found.optimum(found.values, 1e22)
    assert parameters == pytest.approx(best[1], rel=0.03)
    assert 6 * parameters * tokens == pytest.approx(1e22)
    assert loss == pytest.approx(best[0], rel=1e-3)


@pytest.mark.alone
def test_intervals_cover_the_exponents():
    """At 95 %, of 2 x 8 intervals of series with other noise, fewer than 12 cover with a probability of 0.1 %."""
    covered = []
    for seed in range(8):
        found = scaling.fit(chinchilla(0.003, seed), samples=40, seed=seed)
        for name, truth in (("alpha", ALPHA), ("beta", BETA)):
            value, low, high = found.interval(lambda v, name=name: float(v[found.exponents[name]]))  # noqa: B023
            assert abs(value - truth) < 0.1
            assert high - low < 0.2  # they say something
            covered.append(low <= truth <= high)
    assert sum(covered) >= 12


def test_a_series_of_one_dial_has_one_exponent(tmp_path):
    series = one_dial(0.002, 1)
    found = scaling.fit(series, samples=60)
    assert found.one_dial
    value, low, high = found.interval(lambda values: float(values[2]))
    assert low <= 0.14 <= high
    assert abs(value - 0.14) < 0.03
    parameters, tokens, loss = found.optimum(found.values, 6 * 20 * 1e10**2)
    assert parameters == pytest.approx(1e10, rel=1e-3)
    assert tokens == pytest.approx(2e11, rel=1e-3)
    assert loss == pytest.approx(1.5 + 200 / (6 * 20 * 1e10**2) ** 0.14, rel=0.02)
    text = scaling.report(found, [1e21])
    assert "their effects cannot be told apart" in text
    assert "1e+21 FLOPs: " in text
    assert "8.33 times the largest run" in text
    scaling.plot(found, [1e21], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_too_few_runs_are_refused(capsys):
    values = [1e6, 2e6, 1e6], [1e7, 1e7, 3e7], [6e13, 12e13, 18e13], [3, 2.9, 2.8]
    few = scaling.Series(*map(np.array, values))
    with pytest.raises(UserError, match=r"^runs: got 3 of 3 sizes, must be at least 6 where size and tokens vary"):
        scaling.fit(few)
    with pytest.raises(UserError, match=r"^runs: got losses of nan, must be finite"):
        scaling.Series(*[np.ones(3)] * 3, np.array([1, np.nan, 2]))
    for command in ("scaling", "leaderboard"):
        assert main([command]) == 2
        assert capsys.readouterr().err.startswith("error: runs: got none, must be at least one run folder")


def test_one_dial_sets_sizes_and_rates(capsys):
    base = Dial(depth=4, width=256, heads=2, steps=400, batch=8, learning_rate=5e-3, weight_decay=0.1)
    assert base.at(4, 4_096) == base
    for depth in (2, 8, 16, 32):
        dial = base.at(depth, 4_096)
        assert (dial.width, dial.width // dial.heads) == (64 * depth, 128)
        tokens = [d.steps * d.batch / d.parameters(4_096) for d in (base, dial)]
        assert tokens[1] == pytest.approx(tokens[0], rel=0.01)  # steps are whole
        more = dial.parameters(4_096) / base.parameters(4_096)
        assert abs(np.log2(dial.batch / base.batch / more**0.383)) <= 0.5
        assert dial.learning_rate == pytest.approx(base.learning_rate * (dial.batch / base.batch) ** 0.5)
    assert base.at(5, 4_096).width == 384  # whole heads
    assert run.main(["nanochat_d4", "--depth", "8", "--print"]) == 0
    assert "layers=8" in capsys.readouterr().out
    assert run.main(["quickstart", "--depth", "8", "--print"]) == 2
    assert "has no function at_depth" in capsys.readouterr().err
