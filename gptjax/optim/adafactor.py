"""Adafactor: factored second moments."""

from __future__ import annotations

import dataclasses

import jax
import optax

from gptjax.distributed.parameters import ParamInfo
from gptjax.optim.optimizers import Optimizer, partition
from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor (arXiv:1804.04235): the gradient divided by the root of a factored second moment (rows and columns),
    its root mean square clipped to 1, times the root mean square of the parameter. The state is small, and the learning
    rate is relative to the size of the parameter. Each layer of a stack is treated as a separate parameter."""

    learning_rate: float = 1e-2
    """Peak learning rate, relative to the root mean square of each parameter."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    factor_from: int = 32
    """Minimum length of the two longest axes for the second moment to be factored."""

    width_power = 0.5
    """A step is relative to the matrix, whose elements are smaller in a wider model already."""

    def update_transform(self, info: Params) -> optax.GradientTransformation:
        one = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=self.factor_from),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
        each = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))

        def depth(i: ParamInfo) -> str:
            return f"{i.shape[0]} layers" if i.stacked else "single"

        return partition(info, depth, lambda label, _: one if label == "single" else each)
