"""Optimizers over optax. Clipping, weight decay and learning rate are shared; a subclass defines the direction:

    info = parameter_info(model)
    transform = AdamW(learning_rate=6e-4, schedule=Cosine(warmup=2_000)).build(50_000, info)  # an optax transformation

A new optimizer is a subclass with its own `update_transform`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import optax

from gptjax.distributed.parameters import ParamInfo
from gptjax.optim.schedules import Cosine, Schedule, check
from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
    """Base class. With the subclass's direction d, computed from the clipped gradient, a step is

        parameter -= learning_rate (d + weight_decay parameter)

    where weight decay applies to matrices and heads (`ParamInfo.decays`), not to scales and biases; with
    `cautious_decay` only to elements that d moves towards zero, `d parameter > 0`.
    """

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = Cosine()
    """Learning-rate schedule."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    cautious_decay: bool = False
    """Apply weight decay to those elements alone that the step moves towards zero anyway (arXiv:2510.12402)."""
    decay_embeddings: bool = False
    """Apply weight decay to embeddings too, as in GPT-2."""
    clip: float | None = 1.0
    """Maximum global gradient norm. None: no clipping."""

    def __post_init__(self):
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "positive")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "positive, or None for no clipping")
        for field in ("b1", "b2", "momentum"):
            rate = getattr(self, field, 0.0)
            check(0 <= rate < 1, f"optimizer.{field}", rate, "0 or more and less than 1")

    width_power: ClassVar[float] = 1.0
    """Exponent p of the muP learning rate of hidden matrices, learning_rate / width_multiplier^p: the power of the
    width that the spectral norm of an update grows with (arXiv:2310.17813). 1 where the size of each element is fixed,
    as in Adam."""

    @abc.abstractmethod
    def update_transform(self, info: Params) -> optax.GradientTransformation:
        """Gradient -> direction d, before weight decay and learning rate. `info`: `parameter_info` of the model."""

    def learning_rate_schedule(self, steps: int) -> optax.Schedule:
        """Step, from 0 -> learning rate, for a run of `steps`."""
        return self.schedule.build(self.learning_rate, steps)

    def with_schedule(self, schedule: Schedule) -> Self:
        """This optimizer with another schedule."""
        return dataclasses.replace(self, schedule=schedule)

    def decays(self, info: Params) -> Params:
        """Weight-decay mask: True for each parameter that decays."""
        return jax.tree.map(lambda i: i.decays or (self.decay_embeddings and i.kind == "embedding"), info)

    def build(self, steps: int, info: Params, width_multiplier: float = 1.0) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps`. Raises UserError if the schedule does not fit.

        info              `parameter_info` of the model
        width_multiplier  width divided by the width that the learning rate was tuned at (muP): the updates of hidden
                          matrices are divided by `width_multiplier**width_power`, their decay is not, as in
                          `mup.MuAdamW`
        """
        direction = self.update_transform(info)
        if width_multiplier != 1:
            direction = optax.chain(direction, _scale_matrices(width_multiplier**-self.width_power, info))
        return optax.chain(
            optax.identity() if self.clip is None else _clip(self.clip),
            direction,
            _add_cautious_decay(self.weight_decay, self.decays(info))
            if self.cautious_decay
            else optax.add_decayed_weights(self.weight_decay, mask=self.decays(info)),
            optax.scale_by_learning_rate(self.learning_rate_schedule(steps)),
        )


def partition(
    info: Params,
    label: Callable[[ParamInfo], str],
    transform: Callable[[str, Params], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """`optax.partition` by parameter information: `transform(label, info of the parameters with it)` per label."""
    labels = jax.tree.map(label, info)

    def masked(name: str) -> Params:
        return jax.tree.map(lambda i, own: i if own == name else optax.MaskedNode(), info, labels)

    return optax.partition({name: transform(name, masked(name)) for name in sorted({*jax.tree.leaves(labels)})}, labels)


def _clip(norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with one product per element. optax's division prevents fusion in XLA and costs
    another pass over all gradients."""

    def clip(updates, _):
        scale = jnp.minimum(1.0, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates)

    return optax.stateless(clip)


def _add_cautious_decay(rate: float, decays: Params) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` for the elements whose update has the sign of the parameter."""

    def decay(updates: Params, params: Params) -> Params:
        return jax.tree.map(lambda d, p, on: d + rate * p * (d * p > 0) if on else d, updates, params, decays)

    return optax.stateless(decay)


def _scale_matrices(scale: float, info: Params) -> optax.GradientTransformation:
    def scaled(updates, _):
        return jax.tree.map(lambda x, i: scale * x if i.is_matrix else x, updates, info)

    return optax.stateless(scaled)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101): `d = m / (sqrt(v) + eps)` with the bias-corrected moving
    averages m and v of the gradient and its square."""

    b1: float = 0.9
    """Exponential decay rate of the first moment."""
    b2: float = 0.95
    """Exponential decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def update_transform(self, info: Params) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (arXiv:2302.06675): the sign of a moving average of the gradient. Needs a learning rate 3 to 10 times lower
    and a weight decay as many times higher than AdamW. One number of state per parameter."""

    learning_rate: float = 1e-4
    """Peak learning rate: the change of every parameter per step."""
    weight_decay: float = 0.3
    """Decoupled weight decay, multiplied by the learning rate."""
    b1: float = 0.9
    """Weight of the moving average in the direction; the gradient has 1 - b1."""
    b2: float = 0.99
    """Exponential decay rate of the moving average."""

    def update_transform(self, info: Params) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)
