"""Memory of a run's other programs: the first state, validation losses and text samples.

They run while the state of the training is in memory, and may need more than a step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.experiment.experiment import SAMPLE_TOKENS, SAMPLING, Experiment
from gptjax.inference.generate import decode, prefill, round_up
from gptjax.inference.sampling import SamplingRows
from gptjax.nn import unstack
from gptjax.plan.compiled import AbstractRun, abstract_run, on_mesh, too_large
from gptjax.plan.compiler import optimise
from gptjax.train.stage import Stage
from gptjax.train.state import device_bytes

Lowering = tuple[Callable[[], jax.stages.Lowered], int]
"""Lowers a program; bytes per device of what is in memory while it runs: its arguments and everything else."""
Call = Callable[[Callable[[Sequence[Any]], Any]], Any]
"""Calls a function of devices, as `Target.call` does."""


def other_programs(experiment: Experiment, name: str, call: Call) -> dict[str, float]:
    """Bytes of a device in use while each of a stage's other programs runs. Infinity: the compiler refuses it, as it
    does not fit. Without what the engine needs, in stages whose batches the model writes. Every program is compiled in
    a call of its own, so that none waits for the machine code of another."""
    found: dict[str, float] = {}
    for index in itertools.count():
        one = call(functools.partial(_in_use, experiment, name, index))
        if one is None:
            return found
        program, size = one
        found[program] = max(found.get(program, 0), size)
    return found


def _in_use(experiment: Experiment, name: str, index: int, devices: Sequence[Any]) -> tuple[str, float] | None:
    """Name and bytes of one of the programs. None: there are not so many."""
    run, stage = abstract_run(experiment, name, devices), experiment.stages[name]
    with jax.set_mesh(run.mesh):
        one = next(itertools.islice(_programs(run, stage), index, None), None)
        if one is None:
            return None
        program, (lower, resident) = one
        try:
            buffers = optimise(lower(), devices[0].platform).buffers
        except jax.errors.JaxRuntimeError as error:
            if not too_large(error):
                raise
            return program, float("inf")
    return program, resident + buffers.temporaries + buffers.outputs + buffers.constants


def _programs(run: AbstractRun, stage: Stage) -> Iterator[tuple[str, Lowering]]:
    functions, state, frozen = run.program, run.state, device_bytes(run.frozen)
    yield "first state", (functools.partial(jax.jit(functions.init_state).lower, *run.frozen), frozen)
    resident = device_bytes(state) + frozen
    if not stage.writes:
        lower = functools.partial(functions.evaluate.lower, state.eval_params, run.batch, *run.frozen)
        yield "validation loss", (lower, resident + device_bytes(run.batch))
    if stage.prompts and run.model.config.architecture in ("decoder", "encoder-decoder"):
        for lower, more in _samples(run, stage):
            yield "text sample", (lower, resident + more)


def _samples(run: AbstractRun, stage: Stage) -> Iterator[Lowering]:
    """Programs that write a text sample, and bytes of their arguments. The number of tokens of a prompt is bounded by
    that of its bytes."""
    model: Any = run.model
    params = run.state.eval_params
    merged = on_mesh(jax.eval_shape(run.program.merge, params, *run.frozen), run.mesh)
    layers = on_mesh(jax.eval_shape(functools.partial(unstack, model.config), merged), run.mesh)
    resident = device_bytes(layers) + (device_bytes(merged) if stage.adapter is not None else 0)
    longest, vocab = max(len(prompt.encode()) for prompt in stage.prompts), model.config.vocab
    T, room, one = round_up(longest), round_up(SAMPLE_TOKENS), jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens, seeds = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.uint32)
    if model.config.architecture == "decoder":
        begin, inputs = functools.partial(prefill, samples=1, size=round_up(T + SAMPLE_TOKENS), room=room), (one, seeds)
    else:
        from gptjax.inference.sequence_to_sequence import begin as encode

        begin, inputs = functools.partial(encode, size=room), (tokens, jax.ShapeDtypeStruct((), jnp.int32), seeds)
    begin = jax.jit(functools.partial(begin, model, vocab=vocab))
    yield functools.partial(begin.lower, layers, tokens, *inputs), resident
    state = on_mesh(jax.eval_shape(begin, layers, tokens, *inputs), run.mesh)
    done, ends = np.zeros(1, bool), np.zeros(1, np.int32)
    rows = SamplingRows.of([SAMPLING])
    lower = functools.partial(decode.lower, model, layers, state, SAMPLE_TOKENS, done, ends, rows)
    yield lower, resident + device_bytes(state)
