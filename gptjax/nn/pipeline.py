"""Pipeline parallelism: stages of a stack, each on devices of its own, parts of a batch one behind the other (GPipe,
Huang et al. 2018, arXiv:1811.06965).

Of S stages, stage s works on part p in tick p + s, and passes what it made on to the next. M parts take M + S - 1
ticks, so that all devices are idle for (S - 1) / (M + S - 1) of the time: more parts waste less, and are smaller.

    tick       0    1    2    3    4          S = 3, M = 3
    stage 0    p0   p1   p2   -    -
    stage 1    -    p0   p1   p2   -
    stage 2    -    -    p0   p1   p2

In a tick every device sends one part's activations, [B / M, T, D]. The backward pass is the same in reverse. What
layers keep for it they keep for all parts, so that a remat policy (`remat`) saves as much here as it does without
stages.

Embedding and head, before and after the layers, are data parallel: where the rules say so, as `DEFAULT_RULES` does,
each stage has a share of the batch there. Stages gather it before the first layer, and get shares of the last stage's
output.
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
from gptjax.types import Array, Params, UserError

Layers = Callable[[Array, Context, Params, Any, Array], tuple[Array, Any, Any]]
"""(x [B / M, T, D], context, params, each, number of the part) -> x through layers, losses and updates (`scan`)."""


def pipeline(
    layers: Layers, params: Params, each: Any, x: Array, context: Context, axes: tuple[str, ...], parts: int | None
) -> tuple[Array, Any, Any]:
    """x [B, T, D] through layers whose parameters [L, ...] lie cut on the mesh `axes`, the stages.

    layers  takes a stage's share of `params` and of `each`, which is cut as they are: a random key for a layer, or None
    parts   M, as how many equal parts the rows of x go through; None: as many as there are stages, where rows can
            be cut so

    Returns x after all layers, placed as it came; the losses, summed over stages, a mean over parts; and the updates of
    each layer, cut as `params` are, summed over parts. Raises UserError where M does not cut the rows.
    """
    mesh, place = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.spec
    others = tuple(name for name in axes_of(place[0]) if name not in axes)
    stages, copies = (math.prod(mesh.shape[name] for name in names) for names in (axes, others))
    rows = x.shape[0] // copies
    parts = parts or math.gcd(rows, stages)
    if rows % parts:
        raise UserError(
            f"model.microbatches: got {parts}, must divide the {rows} rows of a batch that a stage has in a step "
            "(in a part of it, where the stage accumulates)"
        )

    x0_is_x = context.x0 is x  # as one array it has one gradient, and that is sent once
    if x0_is_x:
        context = dataclasses.replace(context, x0=None)
    context = context.over_rows(lambda x: _over(others, x))
    by_stage = copies, stages, rows // stages, *x.shape[1:]
    shares = rows % stages == 0  # else too few rows: every stage has them all

    def exchange(x: Array) -> Array:
        """x [copies, stages, B / copies / stages, T, D], a share for each stage, to those that the stages have for this
        one. In place of all_gather, whose gradient jax cannot lower beside explicit axes; as many bytes are sent."""
        move = functools.partial(lax.all_to_all, axis_name=axes, split_axis=1, concat_axis=1, tiled=True)
        spec = jax.typeof(x).sharding.spec
        if not (cut := {name for part in spec for name in axes_of(part)}):
            return move(x)
        # Over the axes that cut x too: beside them XLA gathers it.
        return jax.shard_map(move, in_specs=spec, out_specs=spec, axis_names=cut, check_vma=False)(x)

    def run(params: Params, each: Any, x: Array, context: Context) -> tuple[Array, Any, Any]:
        here = lax.axis_index(axes)
        if shares:
            x = exchange(jnp.repeat(x, stages, axis=1))
            x = jnp.reshape(x, (copies * rows, *x.shape[3:]), out_sharding=PartitionSpec(others, *place[1:]))
        xs, contexts = (
            split_microbatches(x, parts),
            context.over_rows(functools.partial(split_microbatches, count=parts)),
        )
        if x0_is_x:
            contexts = dataclasses.replace(contexts, x0=xs)

        def work(arrived: Array, number: Array) -> tuple[Array, Any, Any]:
            """A part through the layers of this stage."""
            one = functools.partial(lax.dynamic_index_in_dim, index=number, keepdims=False)
            return layers(jnp.where(here == 0, one(xs), arrived), contexts.over_rows(one), params, each, number)

        def tick(carry: tuple[Array, Array, Any], time: Array) -> tuple[Any, None]:
            arrived, done, sums = carry
            number = jnp.clip(time - here, 0, parts - 1)
            y, *more = work(arrived, number)
            counts = number == time - here  # before its first part and after its last, a stage works for nothing
            done = jnp.where(counts, lax.dynamic_update_index_in_dim(done, y, number, 0), done)
            sums = jax.tree.map(lambda total, one: total + jnp.where(counts, one, 0), sums, more)
            return (lax.ppermute(y, axes, [(i, i + 1) for i in range(stages - 1)]), done, sums), None

        _, *more = jax.eval_shape(work, xs[0], here)
        sums = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), more)
        (_, done, sums), _ = lax.scan(tick, (xs[0], xs, sums), jnp.arange(parts + stages - 1))
        done = done.swapaxes(0, 1).reshape(x.shape)
        if shares:
            done = jnp.reshape(done, by_stage, out_sharding=PartitionSpec(others, None, None, *place[1:]))
            done = exchange(done)[:, -1:]
        else:
            done = lax.psum(jnp.where(here == stages - 1, done, 0), axes)
        losses, updates = sums
        return done, jax.tree.map(lambda total: lax.psum(total, axes) / parts, losses), updates

    cut, whole = PartitionSpec(axes), PartitionSpec()
    x = _over((*others, *axes) if shares else others, x)
    shape, spec, ends = x.shape, jax.typeof(x).sharding.spec, PartitionSpec(None, axes) if shares else whole
    if shares:
        x = jnp.reshape(x, by_stage, out_sharding=PartitionSpec(others, axes, None, *place[1:]))
    stages_of = partial_map(run, axes, (cut, cut, ends, whole), (ends, whole, cut))
    y, losses, updates = stages_of(params, each, x, context)
    return jax.reshard(jnp.reshape(y, shape, out_sharding=spec), place), losses, updates


def _over(axes: tuple[str, ...], x: Array) -> Array:
    """x [B, ...] with its rows cut over these axes of the mesh."""
    return jax.reshard(x, PartitionSpec(axes, *jax.typeof(x).sharding.spec[1:]))
