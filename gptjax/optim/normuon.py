"""NorMuon: Muon with a second moment for each neuron."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from gptjax.distributed.parameters import ParamInfo
from gptjax.optim.muon import Muon
from gptjax.optim.schedules import check
from gptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class NorMuon(Muon):
    """Muon whose update u [I, O] is normalised for each of the O neurons (arXiv:2510.05491):

        v = beta v + (1 - beta) mean_I(u^2),  d = u / sqrt(v), scaled to a root mean square of 0.2 per matrix

    with beta the `neuron_decay`. All neurons of a matrix then change alike. The state has one number per neuron more
    than Muon's."""

    neuron_decay: float = 0.95
    """Exponential decay rate of the mean square of each neuron's update."""

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.neuron_decay < 1, "optimizer.neuron_decay", self.neuron_decay, "0 or more and less than 1")

    def _orthogonal(self, info: Params) -> optax.GradientTransformation:
        return optax.chain(super()._orthogonal(info), _normalise_neurons(self.neuron_decay, self.eps, info))


def _normalise_neurons(decay: float, eps: float, info: Params) -> optax.GradientTransformation:
    """Divide each neuron by its root mean square over the last steps, and scale each matrix to a root mean square of
    0.2. The scaling makes a bias correction of the average superfluous: it is the same factor for all neurons."""

    def mean_square(x: Array, i: ParamInfo, outputs: bool = False) -> Array:
        stop = x.ndim if outputs else i.batch + i.inputs
        return jnp.square(x).mean(range(i.batch, stop), keepdims=True)

    def init(params: Params) -> optax.ScaleByRmsState:
        return optax.ScaleByRmsState(jax.tree.map(lambda p, i: jnp.zeros_like(mean_square(p, i)), params, info))

    def update(updates, state, params=None):
        nu = jax.tree.map(lambda v, u, i: decay * v + (1 - decay) * mean_square(u, i), state.nu, updates, info)
        even = jax.tree.map(lambda u, v: u / (jnp.sqrt(v) + eps), updates, nu)
        scaled = jax.tree.map(lambda u, i: 0.2 * u / (jnp.sqrt(mean_square(u, i, outputs=True)) + eps), even, info)
        return scaled, optax.ScaleByRmsState(nu)

    return optax.GradientTransformation(init, update)
