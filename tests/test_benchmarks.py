"""The command that compares speeds: its ratio, and its verdict on a slower revision. Nothing is timed."""

import contextlib
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def command(monkeypatch):
    """`python -m benchmarks`, with times (this tree's, the other's) in place of measurements."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = runpy.run_path(str(BENCHMARKS / "__main__.py"))["main"].__globals__

    def main(times, *words):
        left = list(times)
        monkeypatch.setitem(names, "measure", lambda *arguments: left.pop(0))
        monkeypatch.setitem(names, "machine", lambda: "a machine")
        monkeypatch.setitem(names, "tree_of", lambda revision: contextlib.nullcontext(Path(revision)))
        monkeypatch.setattr("sys.argv", ["benchmarks", *words])
        names["main"]()
        assert not left

    return main


def test_a_ratio_is_the_median_over_turns_of_the_others_time(command, capsys):
    command([([2.0, 4.0, 1.0], [3.0, 3.0, 3.0])], "training")
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "| training step, 4 x 128 | 2.0 | PyTorch | 3.0 | **1.50** | 0.75 to 3.00 | cpu |"


def test_a_tree_that_is_slower_in_two_measurements_fails(command):
    fast, slow = ([1.2], [1.0]), ([1.3], [1.0])
    command([slow, fast], "training", "--against", "main")
    with pytest.raises(SystemExit, match=r"^training step, 4 x 128: 1.30 times the time at main, must be at most 1.25"):
        command([slow, slow], "training", "--against", "main")
