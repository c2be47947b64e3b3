"""The loss of classifiers is its equation, also with smoothed labels, and is not smoothed in evaluation."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from gptjax.objectives import Classification
from gptjax.types import Labelled, UserError


def test_label_smoothing_is_its_equation_in_training_alone():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 2, 5)).astype(np.float32), np.array([[0, 4], [2, -1], [1, 3]])
    ones = np.ones((3, 4), np.int32)
    batch = Labelled(ones, ones, ones.astype(np.float32), ones, ones, labels=labels)

    def apply(*args, **kwargs):
        return (jax.numpy.asarray(logits), None), {}

    log_p, known = log_softmax(logits.astype(np.float64), -1), labels >= 0
    plain = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0][known].sum()
    spread = -log_p.mean(-1)[known].sum()
    objective = Classification(label_smoothing=0.2)
    trained, evaluated = objective(apply, {}, batch, jax.random.key(0)), objective(apply, {}, batch)
    np.testing.assert_allclose(trained["loss"][0], 0.8 * plain + 0.2 * spread, rtol=1e-5)
    np.testing.assert_allclose(trained["cross_entropy"][0], plain, rtol=1e-5)
    np.testing.assert_allclose(evaluated["loss"][0], plain, rtol=1e-5)
    assert float(trained["loss"][1]) == 5
    with pytest.raises(UserError, match=r"^objective\.label_smoothing: got 1\.0, must be from 0 to below 1"):
        Classification(label_smoothing=1.0)
