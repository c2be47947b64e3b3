"""Muon: orthogonal updates for the hidden matrices."""

from __future__ import annotations

import dataclasses
import math

import jax
import optax
import optax.contrib
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from gptjax.distributed.parameters import Matrix, by_name, matrix
from gptjax.optim.optimizers import Optimizer
from gptjax.optim.schedules import check
from gptjax.types import Params


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

    width_power = 0.5
    """An orthogonal matrix times sqrt(max(I, O)) has a spectral norm that grows with the root of the width."""

    def __post_init__(self):
        super().__post_init__()
        check(self.iterations >= 1, "optimizer.iterations", self.iterations, "1 or more")

    def update_transform(self) -> optax.GradientTransformation:
        def axes(params: Params) -> Params:
            def numbers(names: list[str]) -> MuonDimensionNumbers | None:
                kind = matrix(names)
                return None if kind is None else MuonDimensionNumbers(*kind.split(tuple(range(-4, 0)))[1:])

            return by_name(numbers, params)

        def same_rms(updates, _):
            def scaled(x, kind):
                return 0.2 * math.sqrt(max(kind.size(x.shape))) * x

            return jax.tree.map(scaled, updates, by_name(matrix, updates))

        orthogonal = optax.contrib.scale_by_muon(
            beta=self.momentum, ns_steps=self.iterations, weight_dimension_numbers=axes
        )
        return optax.partition(
            {
                "matrix": optax.chain(_of_whole_matrices(orthogonal), optax.stateless(same_rms)),
                "other": optax.scale_by_adam(self.b1, self.b2, self.eps),
            },
            lambda params: by_name(lambda names: "other" if matrix(names) is None else "matrix", params),
        )


def _of_whole_matrices(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon's transformation where a mesh cuts matrices into parts: each device gets some of the layers whole, or all of
    them where the devices can't share out the layers evenly, and sends the parts of the result back. To multiply parts
    instead would send them in every iteration."""

    def place(kind: Matrix, x: jax.Array) -> PartitionSpec:
        layers, *_ = kind.split(x.shape)
        sizes, axes = jax.sharding.get_abstract_mesh().shape, ()
        for axis in jax.tree.leaves(tuple(jax.typeof(x).sharding.spec)):
            if layers and layers[0] % math.prod(sizes[name] for name in (*axes, axis)) == 0:
                axes = (*axes, axis)
        return PartitionSpec(axes or None)

    def update(updates, state, params=None):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return transformation.update(updates, state, params)

        def move(tree, places):
            return jax.tree.map(lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec)), tree, places)

        own = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, updates)
        whole = jax.tree.map(place, by_name(matrix, updates), updates)
        gradients, before = move(updates, whole), state._replace(mu=move(state.mu, whole))
        # Inside, the compiler chooses: products of a matrix with its own transpose are ambiguous under explicit axes.
        # A count that was made outside the mesh has a spec, but not its mesh.
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (gradients, before))
        automatic = jax.sharding.auto_axes(transformation.update, out_sharding=shardings)
        directions, after = automatic(gradients, before, params)  # pyright: ignore[reportCallIssue] (as a decorator)
        return move(directions, own), after._replace(mu=move(after.mu, own))

    return optax.GradientTransformation(transformation.init, update)
