"""Memory of a run's other programs: the first state, validation losses and text samples.

They run while the state of the training is in memory, and may need more than a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.experiment.experiment import SAMPLE_TOKENS, SAMPLING, Experiment
from gptjax.inference.generate import decode, prefill, round_up
from gptjax.inference.sampling import SamplingRows
from gptjax.nn import TransformerConfig, unstack
from gptjax.plan.compiled import AbstractRun, abstract_run, on_mesh, too_large
from gptjax.plan.compiler import optimise
from gptjax.train.stage import Stage
from gptjax.train.state import device_bytes

Lowering = tuple[Callable[[], jax.stages.Lowered], int]
"""Lowers a program; bytes per device of what is in memory while it runs: its arguments and everything else."""
Program = Callable[[AbstractRun, Stage], Lowering]
Call = Callable[[Callable[[Sequence[Any]], Any]], Any]
"""Calls a function of devices, as `Target.call` does."""
FEW = (2, 4)
"""Repeats of the layers' pattern in the models from which a text sample's memory is extrapolated."""


def other_programs(experiment: Experiment, name: str, call: Call) -> dict[str, float]:
    """Bytes of a device in use while each of a stage's other programs runs. Infinity: the compiler refuses it, as it
    does not fit. Without what the engine needs, in stages whose batches the model writes. Every program is compiled in
    a call of its own, so that none waits for the machine code of another."""

    def in_use(program: Program, experiment: Experiment = experiment) -> float:
        return call(functools.partial(_in_use, experiment, name, program))

    stage = experiment.stages[name]
    found = {"first state": in_use(_first_state)}
    if not stage.writes:
        found["validation loss"] = in_use(_validation_loss)
    if stage.prompts and experiment.model.architecture in ("decoder", "encoder-decoder"):
        parts = (functools.partial(_of_few_layers, experiment, functools.partial(in_use, p)) for p in (_begin, _decode))
        found["text sample"] = max(part() for part in parts)
    return found


def _of_few_layers(experiment: Experiment, in_use: Callable[[Experiment], float]) -> float:
    """in_use(experiment), extrapolated from models with fewer repeats of the layers' pattern: all memory is linear in
    them, and a program in which every layer is apart takes a second or more to compile for each."""
    model, stages = experiment.model, experiment.mesh.pipeline
    if not isinstance(model, TransformerConfig) or stages < 1:
        return in_use(experiment)
    repeats, layers = model.stack().repeats // stages, len(model.pattern) * stages
    few, more = FEW
    if repeats <= more:
        return in_use(experiment)
    smaller = (
        dataclasses.replace(model, layers=model.layers - less * layers, pipeline_chunks=1)  # a sample needs none
        for less in (repeats - few, repeats - more)
    )
    of_few, of_more = (in_use(dataclasses.replace(experiment, model=one)) for one in smaller)
    return of_few + (of_more - of_few) * (repeats - few) / (more - few)


def _in_use(experiment: Experiment, name: str, program: Program, devices: Sequence[Any]) -> float:
    """Bytes in use while a program runs."""
    run = abstract_run(experiment, name, devices)
    with jax.set_mesh(run.mesh):
        lower, resident = program(run, experiment.stages[name])
        try:
            buffers = optimise(lower(), devices[0].platform).buffers
        except jax.errors.JaxRuntimeError as error:
            if not too_large(error):
                raise
            return float("inf")
    return resident + buffers.temporaries + buffers.outputs + buffers.constants


def _first_state(run: AbstractRun, stage: Stage) -> Lowering:
    return functools.partial(jax.jit(run.program.init_state).lower, *run.frozen), device_bytes(run.frozen)


def _validation_loss(run: AbstractRun, stage: Stage) -> Lowering:
    lower = functools.partial(run.program.evaluate.lower, run.state.eval_params, run.batch, *run.frozen)
    return lower, device_bytes((run.state, run.frozen, run.batch))


def _begin(run: AbstractRun, stage: Stage) -> Lowering:
    """Beginning of a text sample: a prompt, or what the decoder reads of the encoder."""
    begin, inputs, resident = _sample(run, stage)
    return functools.partial(begin.lower, *inputs), resident


def _decode(run: AbstractRun, stage: Stage) -> Lowering:
    """Tokens of a text sample."""
    begin, inputs, resident = _sample(run, stage)
    state = on_mesh(jax.eval_shape(begin, *inputs), run.mesh)
    done, ends = np.zeros(1, bool), np.zeros(1, np.int32)
    rows = SamplingRows.of([SAMPLING])
    lower = functools.partial(decode.lower, run.model, inputs[0], state, SAMPLE_TOKENS, done, ends, rows)
    return lower, resident + device_bytes(state)


def _sample(run: AbstractRun, stage: Stage) -> tuple[Any, tuple[Any, ...], int]:
    """The program that begins a text sample, its arguments, and the bytes of what is in memory then. The number of
    tokens of a prompt is bounded by that of its bytes."""
    model: Any = run.model
    merged = on_mesh(jax.eval_shape(run.program.merge, run.state.eval_params, *run.frozen), run.mesh)
    layers = on_mesh(jax.eval_shape(functools.partial(unstack, model.config), merged), run.mesh)
    resident = device_bytes((run.state, run.frozen, layers, merged if stage.adapter is not None else ()))
    longest, vocab = max(len(prompt.encode()) for prompt in stage.prompts), model.config.vocab
    T, room, one = round_up(longest), round_up(SAMPLE_TOKENS), jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens, seeds = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.uint32)
    if model.config.architecture == "decoder":
        begin, inputs = functools.partial(prefill, samples=1, size=round_up(T + SAMPLE_TOKENS), room=room), (one, seeds)
    else:
        from gptjax.inference.sequence_to_sequence import begin as encode

        begin, inputs = functools.partial(encode, size=room), (tokens, jax.ShapeDtypeStruct((), jnp.int32), seeds)
    return jax.jit(functools.partial(begin, model, vocab=vocab)), (layers, tokens, *inputs), resident
