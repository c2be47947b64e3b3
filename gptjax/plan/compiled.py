"""The training step of an experiment, compiled for devices that need not be here, and what the program takes."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.data import Classify
from gptjax.experiment.experiment import Experiment
from gptjax.plan import hlo
from gptjax.plan.arithmetic import product_flops, silent_kernels
from gptjax.plan.collectives import Collective, collectives
from gptjax.plan.traffic import moved
from gptjax.train.program import program
from gptjax.train.state import State
from gptjax.types import Batch, Labelled


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while it runs a step. `total` is what the compiler says that the program takes."""

    parameters: int
    optimizer: int
    average: int
    """Of the moving average of the parameters."""
    batch: int
    """The batch, frozen parameters under adapters, and what layouts pad."""
    temporaries: int
    """Activations, gradients, and all else that lives within a step."""
    program: int
    """The program, and outputs that take no input's place."""

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step. Bytes and FLOPs are of one device."""

    arrays: dict[str, int]
    """Bytes of each array of the state, by name."""
    count: int
    """Parameters that are trained."""
    memory: Memory | None
    """None: the compiler gave up, as the program does not fit."""
    flops: float = 0.0
    """Of the matrix products in a step; what is computed again in the backward pass counts again."""
    moved: float = 0.0
    """Bytes to and from memory in a step."""
    collectives: tuple[Collective, ...] = ()
    refusal: str = ""
    """What the compiler said when it gave up."""


def compile_step(experiment: Experiment, name: str, devices: Sequence[Any]) -> Step:
    """Traces and compiles what `Experiment.run` would run for the stage `name` on those devices.

    Raises UserError where the experiment does not fit that many devices."""
    experiment.check(len(devices))
    stage, mesh = experiment.stages[name], experiment.mesh.make(devices)
    model = experiment.model.build(experiment.rules)
    # One device has a mesh here too: kernels learn from it what they are compiled for.
    with jax.set_mesh(mesh):
        functions, frozen = program(stage, model), ()
        if stage.adapter is not None:
            frozen = (_placed(jax.eval_shape(functions.parameters), mesh),)
        state = _placed(jax.eval_shape(functions.new, *frozen), mesh)
        place = NamedSharding(mesh, model.rules("batch", "sequence") or PartitionSpec())
        shape = stage.data.batch, stage.data.length
        ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in (jnp.int32, jnp.float32))
        batch: Any = Batch(ids, ids, weights, ids, ids)  # pyright: ignore[reportArgumentType]
        if isinstance(stage.data, Classify):
            labels = jax.ShapeDtypeStruct((stage.data.batch, 1), jnp.int32, sharding=place)
            batch = Labelled(**vars(batch), labels=labels)  # pyright: ignore[reportArgumentType]
        traced = functions.step.trace(state, batch, *frozen)
        arrays = _sizes(state)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        try:
            compiled, text = _compile(traced.lower(), devices[0].platform)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Step(arrays, count, None, refusal=str(error))
    compiled_program, memory = hlo.Program.parse(text), _memory(compiled.memory_analysis(), state)
    flops = product_flops(compiled_program, experiment.rules.num_shards("experts", dict(mesh.shape)))
    if devices[0].platform == "tpu":  # elsewhere kernels are interpreted, and their products are in the text
        flops += silent_kernels(traced.jaxpr.jaxpr)
    return Step(arrays, count, memory, flops, moved(compiled_program), collectives(compiled_program))


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """The compiled program and its text. jaxlib cannot print all that a newer libtpu compiles; libtpu itself can, into
    files."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory(prefix="gptjax-plan-") as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (file,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, file.read_text()


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    def place(x):
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def _bytes(x: Any) -> int:
    """Of one device's share, without padding. A random key is two uint32."""
    size = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return math.prod(x.sharding.shard_shape(x.shape)) * size


def _sizes(tree: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (re.sub(r"[.\[\]']+", ".", jax.tree_util.keystr(path)).strip(".") for path, _ in leaves)
    return {name: _bytes(x) for name, (_, x) in zip(names, leaves, strict=True)}


def _memory(analysis: Any, state: State) -> Memory:
    parameters, optimizer, average = (
        sum(map(_bytes, jax.tree.leaves(tree))) for tree in (state.params, state.opt_state, state.ema)
    )
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        batch=analysis.argument_size_in_bytes - parameters - optimizer - average,
        temporaries=analysis.temp_size_in_bytes,
        program=analysis.generated_code_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    )
