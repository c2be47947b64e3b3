"""Five hundred training steps lie on PyTorch's."""

from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.torch
def test_it_is_as_close_to_the_exact_curve_as_pytorch_is(monkeypatch):
    """Training amplifies rounding, one draw of chance each, so sizes agree to a factor alone. An error in the model,
    the gradient, clipping, decay or the schedule is thousands of times larger."""
    pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loss_curve
    from torch_gpt import Shape

    words = b"the quick brown fox jumps over a lazy dog while nobody looks and then sleeps".split()
    text = b" ".join(words[i] for i in np.random.default_rng(1).integers(len(words), size=2_000))
    exact, ours, theirs = loss_curve.distances(text, Shape(2, 32, 2, 32, 4, 256))
    assert exact[-50:].mean() < 0.4 * exact[0], "it learns"
    assert max(ours[:100].max(), theirs[:100].max()) < 1e-4
    assert ours.max() < 10 * theirs.max() < 1e-2
