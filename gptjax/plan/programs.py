"""Memory of a run's other programs: the first state, validation losses and text samples.

They run while the state of the training is in memory, and may need more than a step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.experiment.experiment import SAMPLE_TOKENS, SAMPLING, Experiment
from gptjax.inference.generate import decode, prefill, round_up
from gptjax.inference.sampling import SamplingRows
from gptjax.nn import unstack
from gptjax.plan.compiled import AbstractRun, abstract_run, on_mesh, too_large
from gptjax.train.stage import Stage
from gptjax.train.state import device_bytes

Lowered = tuple[jax.stages.Lowered, int]
"""A program, and bytes per device of what is in memory while it runs: its arguments and everything else."""


def other_programs(experiment: Experiment, name: str, devices: Sequence[Any]) -> dict[str, float]:
    """Bytes of a device in use while each of a stage's other programs runs. Infinity: the compiler refuses it, as it
    does not fit. Without what the engine needs, in stages whose batches the model writes."""
    run, stage = abstract_run(experiment, name, devices), experiment.stages[name]
    found: dict[str, float] = {}
    with jax.set_mesh(run.mesh):
        for program, (lowered, resident) in _programs(run, stage):
            try:
                memory: Any = lowered.compile().memory_analysis()
            except jax.errors.JaxRuntimeError as error:
                if not too_large(error):
                    raise
                found[program] = float("inf")
                continue
            new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            total = resident + new + memory.generated_code_size_in_bytes
            found[program] = max(found.get(program, 0), total)
    return found


def _programs(run: AbstractRun, stage: Stage) -> Iterator[tuple[str, Lowered]]:
    functions, state, frozen = run.program, run.state, device_bytes(run.frozen)
    yield "first state", (jax.jit(functions.init_state).lower(*run.frozen), frozen)
    resident = device_bytes(state) + frozen
    if not stage.writes:
        lowered = functions.evaluate.lower(state.eval_params, run.batch, *run.frozen)
        yield "validation loss", (lowered, resident + device_bytes(run.batch))
    if stage.prompts and run.model.config.architecture in ("decoder", "encoder-decoder"):
        for lowered, more in _samples(run, stage):
            yield "text sample", (lowered, resident + more)


def _samples(run: AbstractRun, stage: Stage) -> Iterator[Lowered]:
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
    yield begin.lower(layers, tokens, *inputs), resident
    state = on_mesh(jax.eval_shape(begin, layers, tokens, *inputs), run.mesh)
    done, ends = np.zeros(1, bool), np.zeros(1, np.int32)
    lowered = decode.lower(model, layers, state, SAMPLE_TOKENS, done, ends, SamplingRows.of([SAMPLING]))
    yield lowered, resident + device_bytes(state)
