"""Optimizers over optax. An optimizer is a direction; clipping, weight decay and learning rate are common to all:

    AdamW(learning_rate=6e-4, schedule=Cosine(warmup=2_000), weight_decay=0.1, clip=1.0).build(steps=50_000)

A new one is a subclass with its own `update_transform`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from gptjax.distributed.parameters import by_name, matrix
from gptjax.optim.schedules import Cosine, Schedule, check
from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
    """What all optimizers share. With d the direction of the clipped gradient and m the decay mask, a step is

    parameter -= learning_rate (d + weight_decay m parameter)
    """

    learning_rate: float = 3e-4
    """The highest learning rate."""
    schedule: Schedule = Cosine()
    """The learning rate over the run."""
    weight_decay: float = 0.1
    """How much of a parameter is taken away a step, times the learning rate."""
    no_decay: tuple[str, ...] = ("scale", "bias", "embedding", "positions", "magnitude")
    """Parameters that do not decay: these names anywhere on their path ("bias" is also q_bias)."""
    clip: float | None = 1.0
    """Longer gradients are shortened to this global norm; None leaves them alone."""
    balance_rate: float = 1e-3
    """How far the balance bias of a router (`gptjax.nn.Router`) goes a step."""

    def __post_init__(self):
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "positive")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check(self.balance_rate >= 0, "optimizer.balance_rate", self.balance_rate, "0 or more")
        check(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "positive, or None for no clipping")
        for field in ("b1", "b2", "momentum"):
            share = getattr(self, field, 0.0)
            check(0 <= share < 1, f"optimizer.{field}", share, "0 or more and less than 1")

    width_power: ClassVar[float] = 1.0
    """Exponent p of the muP learning rate of a hidden matrix, learning_rate / width_multiplier^p: how fast the spectral
    norm of a step grows with width (arXiv:2310.17813); linearly where elements have a size of their own, as in Adam."""

    @abc.abstractmethod
    def update_transform(self) -> optax.GradientTransformation:
        """Gradient -> the direction to go against, before weight decay and learning rate."""

    def learning_rate_schedule(self, steps: int) -> optax.Schedule:
        """Step, from 0 -> learning rate, for a run of `steps`."""
        return self.schedule.build(self.learning_rate, steps)

    def decays(self, params: Params) -> Params:
        """The decay mask: True for each parameter that decays. By name and not by rank, because a norm's scale [D] is
        [L, D] once the layers are stacked."""

        endings = tuple("_" + name for name in self.no_decay)

        def decays(names: list[str]) -> bool:
            return not any(name in self.no_decay or name.endswith(endings) for name in names)

        return by_name(decays, params)

    def build(self, steps: int, width_multiplier: float = 1.0) -> optax.GradientTransformation:
        """The optimizer for a run of `steps`. Raises UserError when the schedule does not fit.

        width_multiplier  width relative to the model whose learning rate this is (muP): the updates of hidden matrices
                          are divided by `width_multiplier**width_power`, their decay is not, as in `mup.MuAdamW`
        """
        direction = self.update_transform()
        if width_multiplier != 1:
            direction = optax.chain(direction, _scale_matrices(width_multiplier**-self.width_power))
        descent = optax.chain(
            optax.identity() if self.clip is None else _clip(self.clip),
            direction,
            optax.add_decayed_weights(self.weight_decay, mask=self.decays),
            optax.scale_by_learning_rate(self.learning_rate_schedule(steps)),
        )
        return _balance(self.balance_rate, descent)


def _balance(rate: float, descent: optax.GradientTransformation) -> optax.GradientTransformation:
    """`descent` for everything but the balance biases of routers. Their gradient is by how much the load of an expert
    is above the mean, of which only the sign counts: arXiv:2408.15664, algorithm 1."""

    def update(updates, state, params=None):
        descended, state = descent.update(updates, state, params)
        biases = by_name(lambda names: names[-1] == "router_balance", updates)

        def step(bias: bool, gradient: jax.Array, update: jax.Array) -> jax.Array:
            return -rate * jnp.sign(gradient) if bias else update

        return jax.tree.map(step, biases, updates, descended), state

    return optax.GradientTransformation(descent.init, update)


def _clip(norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm as one product: its division keeps XLA from fusing, a pass over all gradients more."""

    def clip(updates, _):
        scale = jnp.minimum(1.0, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates)

    return optax.stateless(clip)


def _scale_matrices(scale: float) -> optax.GradientTransformation:
    def scaled(updates, _):
        hidden = by_name(lambda names: matrix(names) is not None, updates)
        return jax.tree.map(lambda x, hidden: scale * x if hidden else x, updates, hidden)

    return optax.stateless(scaled)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101): `d = m / (sqrt(v) + eps)`, m and v the bias-corrected moving
    averages of the gradient and its square."""

    b1: float = 0.9
    """How much of the mean of the gradient is kept a step."""
    b2: float = 0.95
    """How much of the mean of its square is kept a step."""
    eps: float = 1e-8
    """Added to the root of the mean square."""

    def update_transform(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of a moving average of the gradient (arXiv:2302.06675); wants a peak 3 to 10 times lower and a weight
    decay as many times higher than AdamW's. One number of state a parameter."""

    learning_rate: float = 1e-4
    """The highest learning rate: how far every parameter goes a step."""
    weight_decay: float = 0.3
    """How much of a parameter is taken away a step, times the learning rate."""
    b1: float = 0.9
    """How much of the average there is in the direction, beside the gradient."""
    b2: float = 0.99
    """How much of the average is kept a step."""

    def update_transform(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)
