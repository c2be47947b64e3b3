"""Five hundred training steps lie on PyTorch's."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.torch
def test_it_is_as_close_to_the_exact_curve_as_pytorch_is(monkeypatch):
    """Rounding that training has amplified for long is one draw of chance each, so their sizes agree to a factor. An
    error in the model, the gradient, clipping, decay or the schedule is thousands of times larger."""
    pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loss_curve
    from torch_gpt import Shape

    exact, ours, theirs = loss_curve.distances(Shape(2, 32, 2, 32, 4, 256))
    assert exact[-50:].mean() < 0.6 * exact[0], "it learns"
    assert ours[:100].max() < 4 * theirs[:100].max() < 1e-5
    assert ours.max() < 4 * theirs.max() < 1e-2
