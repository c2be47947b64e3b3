"""Device program of a stage: initialisation, training step and evaluation, as functions to trace, compile or call.

It does not depend on data, disks or displays: training, and planning for other devices, use the same program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from gptjax.distributed.parameters import ParamInfo, parameter_info
from gptjax.distributed.xla import Value
from gptjax.protocols import Module
from gptjax.train import state as train_state
from gptjax.train.privacy import UNKNOWN, Mechanism
from gptjax.train.stage import Stage
from gptjax.train.state import State
from gptjax.train.step import make_step, sum_microbatches
from gptjax.types import BESIDE, Array, Batch, Key, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Program:
    """Functions of arrays. `frozen`: the model's parameters at the stage's start as `freeze` returns them, if adapters
    of them are trained or they are the reference of the objective; then the stage's `frozen_models`."""

    init_params: Callable[[], Params]
    """() -> initial parameters of the model."""
    freeze: Callable[[Params], Params]
    """Parameters of the model -> `frozen`: the same, or quantised."""
    init_trainable: Callable[..., Params]
    """(*frozen) -> initial parameters to train: the model's, a copy of `frozen`, or adapters of it."""
    create_state: Callable[[Params], State]
    """Parameters to train -> state before the first step."""
    prepare: jax.stages.Wrapped
    """(params, batch, *frozen) -> batch of a whole step, as its updates read it, jitted; see `Objective.prepare`."""
    step: jax.stages.Wrapped
    """(state, batch, *frozen) -> (state, metrics), jitted. The state is donated."""
    evaluate: jax.stages.Wrapped
    """(params, batch, *frozen) -> metrics without dropout, jitted; in as many microbatches as a step."""
    merge: Callable[..., Params]
    """(params, *frozen) -> parameters of the model."""
    deployed: Callable[..., Params]
    """(params, *frozen) -> the same, rounded by `stage.quantisation`: those that write texts."""

    def init_state(self, *frozen: Params) -> State:
        """Initial state. Call it under jit, so that every array is created with its sharding."""
        return self.create_state(self.init_trainable(*frozen))


def program(
    stage: Stage,
    model: Module,
    seed: int = 0,
    compiler_options: Mapping[str, Value] | None = None,
    mechanism: Mechanism | None = None,
) -> Program:
    """Program of a stage for a module built by a `ModelConfig`. Call its functions with the mesh set.

    seed              of initialisation, dropout and noise
    compiler_options  of XLA, for the step and the validation loss; see `distributed/xla.py`
    mechanism         of `stage.privacy`. None: unknown, for a program that is not run
    """
    private = None if stage.privacy is None else mechanism or UNKNOWN
    info = parameter_info(model)
    trained = info if stage.adapter is None else stage.adapter.info(info)
    beside = stage.objective.parameters(model.config)
    trained = {**trained, BESIDE: beside} if beside else trained
    optimizer = stage.optimizer.build(stage.last_step, trained, model.config.width_multiplier)

    def init_params() -> Params:
        _, key = jax.random.split(train_state.random_key(seed))
        shape, spec = (stage.data.batch, stage.data.length), model.rules("batch", "sequence")
        return model.init(key, jnp.zeros(shape, jnp.int32, out_sharding=spec))["params"]

    def create_state(params: Params) -> State:
        key, _ = jax.random.split(train_state.random_key(seed))
        if beside:
            params = {**params, BESIDE: {name: _zeros(info, model) for name, info in beside.items()}}
        return train_state.create(params, optimizer, key, stage.ema is not None, stage.divergence.statistics())

    init_trainable: Callable[..., Params] = lambda *_: init_params()  # noqa: E731
    freeze: Callable[[Params], Params] = _model_params
    merge: Callable[..., Params] = _model_params
    rounded: Callable[[Params], Params] = lambda params: params  # noqa: E731
    if (qat := stage.quantisation) is not None:
        rounded = functools.partial(qat.rounded, info=info)
    if stage.objective.reference:
        init_trainable = lambda reference, *_: reference  # noqa: E731
    if (adapter := stage.adapter) is not None:
        freeze = lambda params: adapter.freeze(params, info)  # noqa: E731
        init_trainable = lambda params, *_: adapter.init(train_state.random_key(seed), params, info)  # noqa: E731
        merged = jax.jit(adapter.merge)
        merge = lambda adapters, params, *_: merged(params, _model_params(adapters))  # noqa: E731

    def seen(params: Params, frozen: tuple[Params, ...]) -> tuple[Params, tuple[Params, ...]]:
        """Trained and frozen parameters as the objective takes them: adapters are attached."""
        if adapter is None:
            return params, frozen
        own = {BESIDE: params[BESIDE]} if beside else {}
        attached = adapter.attach(frozen[0], _model_params(params))
        return {**attached, **own}, frozen if stage.objective.reference else frozen[1:]

    def adapted(apply: Callable, params: Params, batch: Batch, key: Key | None, *frozen: Params) -> Metrics:
        params, frozen = seen(params, frozen)
        return stage.objective(apply, params, batch, key, *frozen)

    objective = stage.objective if adapter is None else adapted

    def prepare(params: Params, batch: Batch, *frozen: Params) -> Batch:
        if type(batch) is not stage.objective.batch_type:  # it is prepared already, for several updates
            return batch
        params, frozen = seen(params, frozen)
        return stage.objective.prepare(model.apply, params, batch, *frozen, parts=stage.accumulate)

    def evaluate(params: Params, batch: Batch, *frozen: Params) -> Metrics:
        params = rounded(params)
        batch = prepare(params, batch, *frozen)
        measure = lambda part: objective(model.apply, params, part, None, *frozen)  # noqa: E731
        return sum_microbatches(measure, stage.accumulate, batch)

    round_once = jax.jit(rounded)
    return Program(
        init_params,
        freeze,
        init_trainable,
        create_state,
        jax.jit(lambda params, batch, *frozen: prepare(rounded(params), batch, *frozen)),
        make_step(
            *(objective, model.apply, optimizer, stage.accumulate, stage.ema, stage.divergence),
            *(prepare, private, rounded),
            compiler_options=compiler_options,
        ),
        jax.jit(evaluate, compiler_options=dict(compiler_options or {})),
        merge,
        merge if qat is None else lambda params, *frozen: round_once(merge(params, *frozen)),
    )


def _model_params(params: Params, *frozen: Params) -> Params:
    """Trained parameters without those that the objective trains beside them."""
    return {name: branch for name, branch in params.items() if name != BESIDE}


def _zeros(info: ParamInfo, model: Module) -> Array:
    return jnp.zeros(info.shape, jnp.float32, out_sharding=model.rules(*info.axes))
