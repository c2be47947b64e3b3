"""Muon: orthogonalised momentum for the hidden matrices."""

from __future__ import annotations

import dataclasses
import math

import jax
import optax
import optax.contrib
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from gptjax.distributed.parameters import ParamInfo
from gptjax.optim.optimizers import Optimizer, partition
from gptjax.optim.schedules import check
from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz iteration (kellerjordan.github.io/posts/muon) for the hidden matrices,
    Adam for everything else. All heads of a layer form one matrix; layers and experts are separate matrices. The update
    of a matrix [I, O] is scaled by `0.2 sqrt(max(I, O))`, so that learning rate and weight decay have the scale of
    AdamW's (Moonlight, arXiv:2502.16982)."""

    momentum: float = 0.95
    """Exponential decay rate of the momentum of matrices (Nesterov)."""
    iterations: int = 5
    """Newton-Schulz iterations; more are closer to orthogonal."""
    b1: float = 0.9
    """Exponential decay rate of Adam's first moment."""
    b2: float = 0.95
    """Exponential decay rate of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""

    width_power = 0.5
    """An orthogonal matrix times sqrt(max(I, O)) has a spectral norm that grows with the root of the width."""

    def __post_init__(self):
        super().__post_init__()
        check(self.iterations >= 1, "optimizer.iterations", self.iterations, "1 or more")

    def update_transform(self, info: Params) -> optax.GradientTransformation:
        def transform(kind: str, info: Params) -> optax.GradientTransformation:
            return self._orthogonal(info) if kind == "matrix" else optax.scale_by_adam(self.b1, self.b2, self.eps)

        return partition(info, lambda i: "matrix" if i.is_matrix else "other", transform)

    def _orthogonal(self, info: Params) -> optax.GradientTransformation:
        """The transformation of matrices."""

        def dimensions(i: ParamInfo) -> MuonDimensionNumbers:
            return MuonDimensionNumbers(*i.split(tuple(range(-len(i.shape), 0)))[1:])

        def same_rms(updates, _):
            return jax.tree.map(lambda x, i: 0.2 * math.sqrt(max(i.fan)) * x, updates, info)

        orthogonal = optax.contrib.scale_by_muon(
            beta=self.momentum, ns_steps=self.iterations, weight_dimension_numbers=jax.tree.map(dimensions, info)
        )
        return optax.chain(_on_whole_matrices(orthogonal, info), optax.stateless(same_rms))


def _on_whole_matrices(transform: optax.GradientTransformation, info: Params) -> optax.GradientTransformation:
    """Apply Muon's transformation to sharded matrices: each device receives whole matrices of some of the layers, or of
    all layers if they cannot be divided evenly, and sends back the shards of the result. Products of sharded matrices
    would communicate in every iteration."""

    def place(x: jax.Array, i: ParamInfo) -> PartitionSpec:
        sizes, axes = jax.sharding.get_abstract_mesh().shape, ()
        for axis in jax.tree.leaves(tuple(jax.typeof(x).sharding.spec)):
            if i.batch and i.shape[0] % math.prod(sizes[name] for name in (*axes, axis)) == 0:
                axes = (*axes, axis)
        return PartitionSpec(axes or None)

    def update(updates, state, params=None):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return transform.update(updates, state, params)

        def move(tree, places):
            return jax.tree.map(lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec)), tree, places)

        own = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, updates)
        whole = jax.tree.map(place, updates, info)
        gradients, before = move(updates, whole), state._replace(mu=move(state.mu, whole))
        # Inside, axes are automatic: the product of a matrix with its own transpose is ambiguous with explicit axes.
        # A count created outside the mesh has a spec without the mesh.
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (gradients, before))
        automatic = jax.sharding.auto_axes(transform.update, out_sharding=shardings)
        directions, after = automatic(gradients, before, params)  # pyright: ignore[reportCallIssue] (as a decorator)
        return move(directions, own), after._replace(mu=move(after.mu, own))

    return optax.GradientTransformation(transform.init, update)
