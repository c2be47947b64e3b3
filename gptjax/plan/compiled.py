"""An experiment's training step, compiled for devices that need not be present: memory, FLOPs and traffic."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed import xla
from gptjax.distributed.parameters import declared, flat, nested
from gptjax.distributed.sharding import ShardingRules, abstract_array
from gptjax.experiment.experiment import Experiment
from gptjax.models.language_model import LanguageModel
from gptjax.models.loading import load
from gptjax.plan import hlo
from gptjax.plan.arithmetic import silent_kernels
from gptjax.plan.buffers import Buffers, named
from gptjax.plan.collectives import Collective, collectives
from gptjax.plan.compiler import optimise
from gptjax.plan.kernels import Kernel, attention, kernels
from gptjax.protocols import Module
from gptjax.train.program import Program, program
from gptjax.train.state import State
from gptjax.types import Batch, FrozenModel, PyTree


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step, as the compiler's own check counts them: machine code is not included."""

    parameters: int
    optimizer: int
    average: int
    """Exponential moving average of the parameters."""
    batch: int
    """The batch, frozen parameters (under adapters, of a reference or a teacher), and padding of layouts."""
    temporaries: int
    """Activations, gradients and everything else that lives within a step."""
    program: int
    """Constants, and outputs that are not written in place of an input."""

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step. Bytes and FLOPs are per device."""

    arrays: dict[str, int]
    """Bytes of each array of the state, by name."""
    count: int
    """Number of trained parameters."""
    memory: Memory | None
    """None: the compiler failed because the program does not fit."""
    kernels: tuple[Kernel, ...] = ()
    """Instructions that compute or move bytes."""
    silent: float = 0.0
    """FLOPs of Pallas kernels whose cost is not in the program's text; they are not in `kernels`."""
    collectives: tuple[Collective, ...] = ()
    attention: dict[str, int] = dataclasses.field(default_factory=dict)
    """Implementation of attention -> calls per step, where it is a kernel of its own: cuDNN, Pallas."""
    peak: dict[str, int] = dataclasses.field(default_factory=dict)
    """Description -> bytes of the arrays alive when most memory is used, the largest first."""
    options: Mapping[str, xla.Value] = dataclasses.field(default_factory=dict)
    """XLA's options that it was compiled with."""
    refusal: str = ""
    """The compiler's error message if it failed."""

    @property
    def flops(self) -> float:
        """FLOPs of the matrix products per step; rematerialised products count again."""
        return self.silent + sum(kernel.flops for kernel in self.kernels)

    @property
    def moved(self) -> float:
        """Bytes moved to and from memory per step."""
        return sum(kernel.moved for kernel in self.kernels)


def compile_step(experiment: Experiment, name: str, devices: Sequence[Any]) -> Step:
    """Trace and compile the step that `Experiment.run` would run for the stage `name` on these devices. If they are
    not CPUs, the compiler goes on in a thread after this has returned: `Target.call` stops it.

    Raises UserError if the experiment's mesh does not fit the number of devices."""
    run = abstract_run(experiment, name, devices)
    mesh, state = run.mesh, run.state
    with jax.set_mesh(mesh):
        traced = run.program.step.trace(state, run.batch, *run.frozen)
        arrays = _sizes(state)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        try:
            optimised = optimise(traced.lower(), devices[0].platform)
        except jax.errors.JaxRuntimeError as error:
            if not too_large(error):
                raise
            return Step(arrays, count, None, options=run.options, refusal=str(error))
    compiled, platform = hlo.Program.parse(optimised.text), devices[0].platform
    return Step(
        arrays,
        count,
        _memory(optimised.buffers, state),
        kernels(compiled, experiment.rules.num_shards("experts", dict(mesh.shape))),
        silent_kernels(traced.jaxpr.jaxpr, platform),
        collectives(compiled, [device.process_index for device in mesh.devices.flat] if platform == "gpu" else ()),
        attention(compiled),
        named(compiled, optimised.buffers),
        run.options,
    )


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """Functions of a stage, and shapes, dtypes and shardings of their arguments."""

    model: Module
    mesh: jax.sharding.Mesh
    program: Program
    state: State
    batch: Batch
    frozen: tuple[Any, ...]
    options: Mapping[str, xla.Value]
    """XLA's."""


def abstract_run(experiment: Experiment, name: str, devices: Sequence[Any]) -> AbstractRun:
    """The stage `name` on these devices. Call its functions with its mesh set, for one device too: kernels read the
    target platform from it. Raises UserError if the experiment's mesh does not fit the number of devices."""
    experiment.check(len(devices))
    stage, mesh = experiment.stages[name], experiment.mesh.make(devices)
    options = xla.options(devices[0], experiment.xla)
    model = experiment.model.build(experiment.rules)
    loaded = [load(pretrained.path, pretrained.dtype, ShardingRules()) for pretrained in stage.frozen_models.values()]
    with jax.set_mesh(mesh):
        functions, frozen = program(stage, model, compiler_options=options), ()
        if stage.has_frozen:
            frozen = (on_mesh(jax.eval_shape(lambda: functions.freeze(functions.init_params())), mesh),)
        frozen += tuple(_frozen(model, experiment.rules, mesh) for model in loaded)
        state = on_mesh(jax.eval_shape(functions.init_state, *frozen), mesh)
        batch = abstract_array(stage.data.abstract_batch(), model.rules, mesh)
    return AbstractRun(model, mesh, functions, state, batch, frozen, options)


def _frozen(loaded: LanguageModel, rules: ShardingRules, mesh: jax.sharding.Mesh) -> FrozenModel:
    """Shapes, dtypes and shardings of a frozen model on the current mesh."""
    module, params = loaded.config.build(rules), flat(loaded.params)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, params[name].dtype, sharding=x.sharding)
        for name, x in declared(module).items()
    }
    return FrozenModel(on_mesh(nested(shapes), mesh), module)


def on_mesh(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Abstract arrays with their specs on `mesh`."""

    def leaf(x):
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, tree)


def _bytes(x: Any) -> int:
    """Bytes of one device's shard, without padding. A random key is two uint32."""
    size = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return math.prod(x.sharding.shard_shape(x.shape)) * size


def too_large(error: Exception) -> bool:
    """True if the compiler refuses a program that does not fit."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _sizes(tree: PyTree) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (re.sub(r"[.\[\]']+", ".", jax.tree_util.keystr(path)).strip(".") for path, _ in leaves)
    return {name: _bytes(x) for name, (_, x) in zip(names, leaves, strict=True)}


def _memory(buffers: Buffers, state: State) -> Memory:
    parameters, optimizer, average = (
        sum(map(_bytes, jax.tree.leaves(tree))) for tree in (state.params, state.opt_state, state.ema)
    )
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        batch=buffers.arguments - parameters - optimizer - average,
        temporaries=buffers.temporaries,
        program=buffers.constants + buffers.outputs,
    )
