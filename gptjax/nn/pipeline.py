"""Pipeline parallelism: a stack is split into stages on different devices, a batch into microbatches (GPipe, Huang et
al. 2018, arXiv:1811.06965).

Stage s of S processes microbatch p in tick p + s, and sends the result to the next stage. M microbatches take M + S - 1
ticks, so that devices are idle for (S - 1) / (M + S - 1) of the time: more microbatches waste less, and are smaller.

    tick       0    1    2    3    4          S = 3, M = 3
    stage 0    p0   p1   p2   -    -
    stage 1    -    p0   p1   p2   -
    stage 2    -    -    p0   p1   p2

Each tick a device sends the activations of one microbatch, [B / M, T, D]. The backward pass is the same in reverse. The
activations saved for it are those of all microbatches, so that a remat policy (`remat`) saves as much memory as without
a pipeline.

Embedding and head, before and after the layers, are data parallel over the stages if the rules say so, as
`DEFAULT_RULES` does. The batch is gathered before the first layer, and the last stage's output is scattered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.partial_map import partial_map
from gptjax.distributed.sharding import axes_of, split_microbatches
from gptjax.nn.block import Context
from gptjax.types import Array, Key, Params, UserError

Layers = Callable[[Array, Context, Params, Key | None, Array], tuple[Array, Any, Any]]
"""(x [B / M, T, D], context, params, each, microbatch number) -> x after the layers, losses and updates (`scan`)."""


def pipeline(
    layers: Layers,
    params: Params,
    each: Key | None,
    x: Array,
    context: Context,
    axes: tuple[str, ...],
    microbatches: int | None,
) -> tuple[Array, Any, Any]:
    """x [B, T, D] through layers whose parameters [L, ...] are sharded over the mesh `axes`, the stages.

    layers        takes a stage's shard of `params` and of `each`: a random key per layer, or None
    microbatches  M. None: one per stage, or the greatest common divisor with the batch size

    Returns x after all layers, sharded as before; the losses, summed over stages and averaged over microbatches; and
    the updates of each layer, sharded as `params`, summed over microbatches. Raises UserError if M does not divide the
    batch size.
    """
    mesh, x_spec = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.spec
    others = tuple(name for name in axes_of(x_spec[0]) if name not in axes)
    stages, copies = (math.prod(mesh.shape[name] for name in names) for names in (axes, others))
    rows = x.shape[0] // copies
    microbatches = microbatches or math.gcd(rows, stages)
    if rows % microbatches:
        raise UserError(
            f"model.microbatches: got {microbatches}, must divide the {rows} sequences per stage in a step "
            "(per microbatch, with gradient accumulation)"
        )

    x0_is_x = context.x0 is x  # as one array it has one gradient, which is sent once
    if x0_is_x:
        context = dataclasses.replace(context, x0=None)
    context = context.map_batch(lambda x: _over(others, x))
    by_stage = copies, stages, rows // stages, *x.shape[1:]
    scattered = rows % stages == 0  # otherwise there are too few sequences: every stage has them all

    def run(params: Params, each: Key | None, x: Array, context: Context) -> tuple[Array, Any, Any]:
        here = lax.axis_index(axes)
        if scattered:
            x = _exchange(jnp.repeat(x, stages, axis=1), axes)
            x = jnp.reshape(x, (copies * rows, *x.shape[3:]), out_sharding=PartitionSpec(others, *x_spec[1:]))
        xs = split_microbatches(x, microbatches)
        contexts = context.map_batch(functools.partial(split_microbatches, count=microbatches))
        if x0_is_x:
            contexts = dataclasses.replace(contexts, x0=xs)

        def work(arrived: Array, number: Array) -> tuple[Array, Any, Any]:
            """A microbatch through the layers of this stage."""
            one = functools.partial(lax.dynamic_index_in_dim, index=number, keepdims=False)
            return layers(jnp.where(here == 0, one(xs), arrived), contexts.map_batch(one), params, each, number)

        done, (losses, updates) = _schedule(work, xs, here, axes, stages)
        done = done.swapaxes(0, 1).reshape(x.shape)
        if scattered:
            done = jnp.reshape(done, by_stage, out_sharding=PartitionSpec(others, None, None, *x_spec[1:]))
            done = _exchange(done, axes)[:, -1:]
        else:
            done = lax.psum(jnp.where(here == stages - 1, done, 0), axes)
        return done, jax.tree.map(lambda total: lax.psum(total, axes) / microbatches, losses), updates

    sharded, replicated = PartitionSpec(axes), PartitionSpec()
    x = _over((*others, *axes) if scattered else others, x)
    shape, spec, ends = x.shape, jax.typeof(x).sharding.spec, PartitionSpec(None, axes) if scattered else replicated
    if scattered:
        x = jnp.reshape(x, by_stage, out_sharding=PartitionSpec(others, axes, None, *x_spec[1:]))
    run_stages = partial_map(run, axes, (sharded, sharded, ends, replicated), (ends, replicated, sharded))
    y, losses, updates = run_stages(params, each, x, context)
    return jax.reshard(jnp.reshape(y, shape, out_sharding=spec), x_spec), losses, updates


def _schedule(
    work: Callable[[Array, Array], tuple[Array, Any, Any]], xs: Array, here: Array, axes: tuple[str, ...], stages: int
) -> tuple[Array, tuple[Any, Any]]:
    """Microbatches xs [M, B / M, T, D] through this stage, tick by tick.

    work  (input from the stage before, microbatch number) -> output, losses and updates
    here  number of this stage

    Returns this stage's outputs, like `xs`, and the sums of losses and updates over microbatches.
    """
    microbatches = len(xs)

    def tick(carry: tuple[Array, Array, Any], time: Array) -> tuple[Any, None]:
        arrived, done, sums = carry
        number = jnp.clip(time - here, 0, microbatches - 1)
        y, *more = work(arrived, number)
        # Before its first microbatch and after its last, a stage's output is discarded.
        valid = number == time - here
        done = jnp.where(valid, lax.dynamic_update_index_in_dim(done, y, number, 0), done)
        sums = jax.tree.map(lambda total, one: total + jnp.where(valid, one, 0), sums, more)
        return (lax.ppermute(y, axes, [(i, i + 1) for i in range(stages - 1)]), done, sums), None

    _, *more = jax.eval_shape(work, xs[0], here)
    sums = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), more)
    (_, done, (losses, updates)), _ = lax.scan(tick, (xs[0], xs, sums), jnp.arange(microbatches + stages - 1))
    return done, (losses, updates)


def _exchange(x: Array, axes: tuple[str, ...]) -> Array:
    """All-to-all of x [copies, S, B / copies / S, T, D] over the stages, the mesh `axes`. It replaces all_gather, whose
    gradient jax cannot lower beside explicit axes. As many bytes are sent."""
    move = functools.partial(lax.all_to_all, axis_name=axes, split_axis=1, concat_axis=1, tiled=True)
    spec = jax.typeof(x).sharding.spec
    if not (sharded := {name for part in spec for name in axes_of(part)}):
        return move(x)
    # Also over the axes that shard x: otherwise XLA gathers it.
    return jax.shard_map(move, in_specs=spec, out_specs=spec, axis_names=sharded, check_vma=False)(x)


def _over(axes: tuple[str, ...], x: Array) -> Array:
    """x [B, ...] with its batch sharded over these mesh axes."""
    return jax.reshard(x, PartitionSpec(axes, *jax.typeof(x).sharding.spec[1:]))
