"""Training state: parameters, optimizer state, step. A run resumes from it bit for bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.train.divergence import StepStatistics
from gptjax.types import Array, Key, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Array
    """int32 scalar: number of steps done."""
    params: Params
    """float32 master parameters, sharded as the model declares."""
    opt_state: PyTree
    """Optimizer state. Its moments are sharded like the parameters."""
    key: Key
    """The run's random key. Step n uses fold_in(key, n), independent of interruptions."""
    ema: Params | None = None
    """Exponential moving average of the parameters. None: no average."""
    statistics: StepStatistics | None = None
    """Losses and gradient norms of the last good steps, for policies that need them."""

    @property
    def eval_params(self) -> Params:
        """Parameters to evaluate, sample from and deploy: the average if there is one."""
        return self.params if self.ema is None else self.ema


def random_key(seed: int) -> Key:
    """`jax.random.key(seed)`, and another key for every seed of up to 64 bits, of which that takes 32."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return jax.random.fold_in(jax.random.key(low), high) if high else jax.random.key(low)


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key,
    average: bool = False,
    statistics: StepStatistics | None = None,
) -> State:
    """State before the first step. Call it under jit, so that every array is created once, with its sharding."""
    ema = jax.tree.map(jnp.copy, params) if average else None
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, ema, statistics)


def parameter_count(tree: PyTree) -> int:
    """Number of numbers in a tree of arrays, abstract or quantised ones."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape")))


def device_bytes(tree: PyTree) -> int:
    """Bytes on one device of a tree of arrays, or of abstract arrays with shardings."""

    def size(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
