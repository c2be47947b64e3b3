"""Muon: orthogonal updates for the hidden matrices."""

from __future__ import annotations

import dataclasses
import math

import jax
import optax
import optax.contrib
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers

from gptjax.optim.optimizers import Optimizer, by_name
from gptjax.optim.schedules import check
from gptjax.types import Params

_MATRICES = {
    "q": MuonDimensionNumbers((-3,), (-2, -1)),
    "k": MuonDimensionNumbers((-3,), (-2, -1)),
    "v": MuonDimensionNumbers((-3,), (-2, -1)),
    "o": MuonDimensionNumbers((-3, -2), (-1,)),
    "up": MuonDimensionNumbers((-2,), (-1,)),
    "gate": MuonDimensionNumbers((-2,), (-1,)),
    "down": MuonDimensionNumbers((-2,), (-1,)),
    "latent": MuonDimensionNumbers((-2,), (-1,)),
    "rope": MuonDimensionNumbers((-2,), (-1,)),
}
"""The hidden matrices by the last word of their name ("shared_up" is an "up"): their input axes and their output axes.
Axes before these (layers, experts) are a batch."""


def _kind(names: list[str]) -> str:
    return names[-1].rpartition("_")[2]


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum made orthogonal by Newton-Schulz iteration (kellerjordan.github.io/posts/muon) for the hidden matrices,
    the heads of one layer merged; Adam for everything else. A matrix [I, O] is scaled by `0.2 sqrt(max(I, O))`, so
    that peak and weight decay mean what they mean for AdamW (Moonlight, arXiv:2502.16982)."""

    momentum: float = 0.95
    """How much of the mean of the gradient is kept a step, for matrices (Nesterov's kind)."""
    iterations: int = 5
    """Newton-Schulz iterations: more come closer to orthogonal."""
    b1: float = 0.9
    """How much of the mean of the gradient Adam keeps a step."""
    b2: float = 0.95
    """How much of the mean of its square Adam keeps a step."""
    eps: float = 1e-8
    """Added to the root of Adam's mean square."""

    def __post_init__(self):
        super().__post_init__()
        check(self.iterations >= 1, "optimizer.iterations", self.iterations, "1 or more")

    def direction(self) -> optax.GradientTransformation:
        def axes(params: Params) -> Params:
            return by_name(lambda names: _MATRICES[_kind(names)], params)

        def same_rms(updates, _):
            def scaled(x, axes):
                inputs, outputs = (math.prod(x.shape[axis] for axis in side) for side in axes)
                return 0.2 * math.sqrt(max(inputs, outputs)) * x

            return jax.tree.map(scaled, updates, axes(updates))

        orthogonal = optax.contrib.scale_by_muon(
            beta=self.momentum, ns_steps=self.iterations, weight_dimension_numbers=axes
        )
        return optax.partition(
            {
                "matrix": optax.chain(_auto_axes(orthogonal), optax.stateless(same_rms)),
                "other": optax.scale_by_adam(self.b1, self.b2, self.eps),
            },
            lambda params: by_name(lambda names: "matrix" if _kind(names) in _MATRICES else "other", params),
        )


def _auto_axes(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation, with the compiler choosing the shardings inside: products of a sharded matrix with its own
    transpose are ambiguous under explicit axes."""

    def update(updates, state, params=None):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return transformation.update(updates, state, params)
        # A count that was made outside the mesh has a spec, but not its mesh.
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (updates, state))
        automatic = jax.sharding.auto_axes(transformation.update, out_sharding=shardings)
        return automatic(updates, state, params)  # pyright: ignore[reportCallIssue] (typed as a decorator only)

    return optax.GradientTransformation(transformation.init, update)
