"""The training state: parameters, optimizer state, step. A run resumes from it to the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.train.divergence import Watch
from gptjax.types import Array, Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Array
    """int32 scalar: steps done."""
    params: Params
    """float32 masters, sharded as the model declares."""
    opt_state: Any
    """State of the optimizer; its moments are sharded like the parameters."""
    key: Key
    """The run's key. Step n draws from fold_in(key, n): randomness does not depend on how often a run was stopped."""
    ema: Params | None = None
    """Exponential moving average of the parameters, if asked for."""
    watch: Watch | None = None
    """Losses and gradient norms of the last good steps, if the stage judges steps by them."""

    @property
    def best(self) -> Params:
        """The parameters to evaluate, sample from and deploy: the average if there is one."""
        return self.params if self.ema is None else self.ema


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key,
    average: bool = False,
    watch: Watch | None = None,
) -> State:
    """The state before the first step. Call it under jit: no array is then made twice or with another sharding."""
    ema = jax.tree.map(jnp.copy, params) if average else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, ema, watch)
