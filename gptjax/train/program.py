"""The device program of a stage: first state, training step and evaluation, as functions to trace, compile or call.

It knows no data, disks or screens: training, and planning for other devices, use the same program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.distributed.parameters import parameter_info
from gptjax.protocols import Module
from gptjax.train import state as train_state
from gptjax.train.stage import Stage
from gptjax.train.state import State
from gptjax.train.step import make_step
from gptjax.types import Metrics, Params


@dataclasses.dataclass(frozen=True)
class Program:
    """Functions over arrays. `frozen`: the model's parameters if adapters are trained, else nothing."""

    parameters: Callable[[], Params]
    """() -> new parameters of the model."""
    initial: Callable[..., Params]
    """(*frozen) -> new parameters to train: the model's, or adapters of `frozen`."""
    create: Callable[[Params], State]
    """Parameters to train -> the state before the first step."""
    step: Any
    """(state, batch, *frozen) -> (state, metrics), jitted; the state is donated."""
    evaluate: Any
    """(params, batch, *frozen) -> metrics without dropout, jitted."""
    merge: Callable[..., Params]
    """(params, *frozen) -> the model's parameters."""

    def new(self, *frozen: Params) -> State:
        """A new state before the first step. Call it under jit: no array is then made with another sharding."""
        return self.create(self.initial(*frozen))


def program(stage: Stage, model: Module, seed: int = 0) -> Program:
    """The program of a stage for a model that a `ModelConfig` built. Call its functions where the mesh is current.

    seed  of initialisation and dropout
    """
    info = parameter_info(model)
    trained = info if stage.adapter is None else stage.adapter.info(info)
    optimizer = stage.optimizer.build(stage.steps, trained, model.config.width_multiplier)
    objective: Callable[..., Metrics] = stage.objective

    def parameters() -> Params:
        _, key = jax.random.split(jax.random.key(seed))
        shape, place = (stage.data.batch, stage.data.length), model.rules("batch", "sequence")
        return model.init(key, jnp.zeros(shape, jnp.int32, out_sharding=place))["params"]

    def create(params: Params) -> State:
        key, _ = jax.random.split(jax.random.key(seed))
        return train_state.create(params, optimizer, key, stage.ema is not None, stage.divergence.watch())

    initial, merge = parameters, _itself
    if (adapter := stage.adapter) is not None:
        objective = adapter.objective(objective)
        initial = lambda params: adapter.init(jax.random.key(seed), params, info)  # noqa: E731
        merged = jax.jit(adapter.merge)
        merge = lambda adapters, params: merged(params, adapters)  # noqa: E731
    return Program(
        parameters,
        initial,
        create,
        make_step(objective, model.apply, optimizer, stage.accumulate, stage.ema, stage.divergence),
        jax.jit(lambda params, batch, *frozen: objective(model.apply, params, batch, None, *frozen)),
        merge,
    )


def _itself(params: Params) -> Params:
    return params
