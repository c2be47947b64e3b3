"""Each kind of residual connection against its equation."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.nn import (
    MuP,
    NoResidual,
    OutputNorm,
    Parallel,
    Parametrisation,
    Part,
    PostNorm,
    PreNorm,
    PreNormButFirst,
    Residual,
    SandwichNorm,
    ScaledPreNorm,
    ScaledStream,
    TransformerConfig,
)

X, START = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
NORMS = {"norm_1": 2.0, "norm_2": 3.0, "post_norm_1": 5.0, "post_norm_2": 7.0}
"""Multiply in the place of a norm, so that none is taken for another."""


def f(x):
    return x**2 + 1


def g(x):
    return 0.5 * x - 3


def then(x, of):
    """Two sublayers in sequence, each applied as `of(i, sublayer, x)`."""
    return of(2, g, of(1, f, x))


EQUATIONS = {
    PreNorm(): lambda x: then(x, lambda i, f, x: x + f(NORMS[f"norm_{i}"] * x)),
    PreNormButFirst(): lambda x: then(x, lambda i, f, x: x + f(NORMS[f"norm_{i}"] * x if i > 1 else x)),
    ScaledPreNorm(0.3): lambda x: then(x, lambda i, f, x: x + 0.3 * f(NORMS[f"norm_{i}"] * x)),
    ScaledStream(): lambda x: EQUATIONS[PreNorm()](0.7 * x + 0.2 * START),
    PostNorm(): lambda x: then(x, lambda i, f, x: NORMS[f"norm_{i}"] * (x + f(x))),
    SandwichNorm(): lambda x: then(x, lambda i, f, x: x + NORMS[f"post_norm_{i}"] * f(NORMS[f"norm_{i}"] * x)),
    OutputNorm(): lambda x: then(x, lambda i, f, x: x + NORMS[f"norm_{i}"] * f(x)),
    NoResidual(): lambda x: g(f(x)),
    Parallel(): lambda x: x + f(2 * x) + g(3 * x),
    Parallel(shared=True): lambda x: x + f(2 * x) + g(2 * x),
}


@dataclasses.dataclass(frozen=True)
class Sublayers(Part):
    """f and g in turn, as a `Block` runs its sublayers."""

    residual: Residual

    def __call__(self, param, x, x0):
        def norm(name, x):
            return NORMS[name] * x

        x = self.residual.begin(param, norm, x, x0)
        for i, sublayer in enumerate((f, g), 1):
            x = self.residual.add(norm, i, x, sublayer(self.residual.read(norm, i, x)))
        return self.residual.end(x)


@pytest.mark.parametrize("residual", EQUATIONS, ids=str)
def test_the_equation(residual):
    part = Sublayers(residual)
    params = {"params": {"stream_scale": np.float32(0.7), "input_scale": np.float32(0.2)}}
    assert jax.tree.leaves(part.init(jax.random.key(0), X, START)) == (
        [np.float32(0.1), 1] if isinstance(residual, ScaledStream) else []
    )
    # Some ten products and sums in float32.
    np.testing.assert_allclose(part.apply(params, X, START), EQUATIONS[residual](X), rtol=1e-5, atol=1e-5)


def test_zero_outputs_make_every_block_the_identity_at_first():
    """The model begins as norm and head alone, with and without muP."""
    tokens = np.arange(6).reshape(2, 3)
    for parametrisation in (Parametrisation(zero_outputs=True), MuP(base_width=8, zero_outputs=True)):
        model = TransformerConfig(9, layers=2, width=8, heads=2, parametrisation=parametrisation).build()
        params = model.init(jax.random.key(0), tokens)["params"]
        x = np.asarray(params["embedding"])[tokens]
        expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) @ params["embedding"].T
        np.testing.assert_allclose(model.apply({"params": params}, tokens)[0], expected, rtol=1e-5, atol=1e-6)
