"""Adafactor: second moments kept as rows and columns."""

from __future__ import annotations

import dataclasses

import jax
import optax

from gptjax.distributed.parameters import by_name
from gptjax.optim.optimizers import Optimizer


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Divides by a mean square kept only as its rows and columns, clips the direction's root mean square to 1, and
    multiplies by the parameter's own (arXiv:1804.04235): hardly any state, and a learning rate relative to the size of
    the parameter. Each of the stacked layers is on its own."""

    learning_rate: float = 1e-2
    """The highest learning rate, relative to the root mean square of each parameter."""
    weight_decay: float = 0.0
    """How much of a parameter is taken away a step, times the learning rate."""
    factor_from: int = 32
    """Arrays with two axes at least this long keep rows and columns only."""

    width_power = 0.5
    """A step is relative to the matrix, whose elements are smaller in a wider model already."""

    def update_transform(self) -> optax.GradientTransformation:
        return _per_layer(
            optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=self.factor_from),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        )


def _per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation, with each of the layers stacked in params["blocks"] as if it were a parameter of its own."""

    def init(params):
        return jax.vmap(transformation.init)(params) if jax.tree.leaves(params) else transformation.init(params)

    def update(updates, state, params=None):
        one = transformation.update
        return jax.vmap(one)(updates, state, params) if jax.tree.leaves(updates) else one(updates, state, params)

    stacked = optax.GradientTransformation(init, update)
    return optax.partition(
        {"stacked": stacked, "single": transformation},
        lambda params: by_name(lambda names: "stacked" if names[0] == "blocks" else "single", params),
    )
