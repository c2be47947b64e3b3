"""Pipeline parallelism: a stack is split into stages on different devices, a batch into microbatches (GPipe, Huang et
al. 2018, arXiv:1811.06965), and a stage into chunks (the interleaved schedule of Narayanan et al. 2021,
arXiv:2104.04473).

With V chunks per stage, layers are split into V S pieces, and stage s of S computes pieces s, S + s, 2 S + s, ... A
microbatch passes the ring of stages V times, and S microbatches do so before the next S enter. In a tick, a stage
computes one microbatch in one chunk, and sends the result, [B / M, T, D], to the next stage, the last one to the first.
M microbatches take V M + S - 1 ticks if S divides M, so that devices are idle for (S - 1) / (V M + S - 1) of the time:
more microbatches, and more chunks, waste less.

    tick       0    1    2    3    4          S = 3, M = 3, V = 1
    stage 0    p0   p1   p2   -    -
    stage 1    -    p0   p1   p2   -
    stage 2    -    -    p0   p1   p2

    tick       0    1    2    3    4    5    6    7          V = 2: half the layers a tick; ' is the second chunk
    stage 0    p0   p1   p2   p0'  p1'  p2'  -    -
    stage 1    -    p0   p1   p2   p0'  p1'  p2'  -
    stage 2    -    -    p0   p1   p2   p0'  p1'  p2'

The backward pass is the same in reverse. Saved for all microbatches are every layer's input and what `remat` says. With
several chunks, None saves matrix products and attention's results, as saving everything would include a copy of the
chunk's parameters for every tick.

Parameters are stored in the order of the layers, contiguous per stage. With several chunks, stages exchange them before
the first tick, and their gradients after the last: each sends at most its share of the parameters, in float32.

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
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.partial_map import partial_map
from gptjax.distributed.sharding import axes_of, split_microbatches
from gptjax.kernels.attention.spec import SAVED
from gptjax.nn.block import Context
from gptjax.nn.remat import LAYER_INPUT, policy
from gptjax.nn.stack import Stack
from gptjax.types import Array, Key, Params, PyTree, UserError

Layers = Callable[[Array, Context, Params, Key | None, Array], tuple[Array, Any, Any]]
"""(x [B / M, T, D], context, params, keys, microbatch number) -> x after the layers, losses and updates (`scan`)."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of every stage in every tick: all microbatches pass all chunks, in laps of S microbatches."""

    stages: int
    """S."""
    microbatches: int
    """M."""
    chunks: int = 1
    """V, chunks of layers per stage."""

    @property
    def turns(self) -> int:
        """Ticks from a stage's first microbatch to its last: V M if S divides M."""
        laps, last = divmod(self.microbatches - 1, self.stages)
        return self.stages * (self.chunks * (laps + 1) - 1) + last + 1

    @property
    def ticks(self) -> int:
        """Ticks from the first stage's first microbatch to the last stage's last."""
        return self.turns + self.stages - 1

    @property
    def idle(self) -> float:
        """Share of the ticks in which a stage computes what is discarded, the bubble."""
        return 1 - self.chunks * self.microbatches / self.ticks

    def work(self, tick: Array, stage: Array) -> tuple[Array, Array, Array]:
        """Chunk and microbatch that a stage computes in a tick; False if its result is discarded, because the stage
        waits for its first microbatch, for the others after its last, or for those that the last lap lacks."""
        turn = jnp.clip(tick - stage, 0, self.turns - 1)
        lap, rest = jnp.divmod(turn, self.stages * self.chunks)
        chunk, first = jnp.divmod(rest, self.stages)
        number = lap * self.stages + first
        valid = (turn == tick - stage) & (number < self.microbatches)
        return chunk, jnp.minimum(number, self.microbatches - 1), valid


def pipeline(
    layers: Layers, stack: Stack, params: Params, keys: Key | None, x: Array, context: Context
) -> tuple[Array, Any, Any]:
    """x [B, T, D] through the repeats of a stack, whose parameters [L, ...] are sharded over the stages.

    layers  takes a chunk of `params` and of `keys`, one per repeat. None: no dropout

    Returns x after all layers, sharded as before; the losses, summed over stages and averaged over microbatches; and
    the updates of each layer, sharded as `params`, summed over microbatches. Raises UserError if the number of
    microbatches does not divide the batch size, or that of chunks the stage.
    """
    axes, chunks = stack.rules.mesh_axes("layers"), stack.chunks
    mesh, x_spec = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.spec
    others = tuple(name for name in axes_of(x_spec[0]) if name not in axes)
    stages, copies = (math.prod(mesh.shape[name] for name in names) for names in (axes, others))
    rows = x.shape[0] // copies
    microbatches = stack.microbatches or math.gcd(rows, stages)
    if rows % microbatches:
        raise UserError(
            f"model.microbatches: got {microbatches}, must divide the {rows} sequences per stage in a step "
            "(per microbatch, with gradient accumulation)"
        )
    if (repeats := stack.repeats // stages) % chunks:
        raise UserError(f"model.pipeline_chunks: got {chunks}, must divide {repeats}, the layers' repeats per stage")
    if keys is not None:
        pieces = keys.reshape(chunks, stages, -1).swapaxes(0, 1)  # in the order in which stages compute them
        keys = jax.reshard(pieces.reshape(keys.shape), PartitionSpec(axes))

    x0_is_x = context.x0 is x  # as one array it has one gradient, which is sent once
    if x0_is_x:
        context = dataclasses.replace(context, x0=None)
    context = context.map_batch(lambda x: _over(others, x))
    by_stage = copies, stages, rows // stages, *x.shape[1:]
    scattered = rows % stages == 0  # otherwise there are too few sequences: every stage has them all

    def run(params: Params, keys: Key | None, x: Array, context: Context) -> tuple[Array, Any, Any]:
        here = lax.axis_index(axes)
        params, keys = jax.tree.map(lambda leaf: leaf.reshape(chunks, -1, *leaf.shape[1:]), (params, keys))
        params = _exchange_chunks(params, here, axes, stages)
        if scattered:
            x = _exchange(jnp.repeat(x, stages, axis=1), axes)
            x = jnp.reshape(x, (copies * rows, *x.shape[3:]), out_sharding=PartitionSpec(others, *x_spec[1:]))
        xs = split_microbatches(x, microbatches)
        contexts = context.map_batch(functools.partial(split_microbatches, count=microbatches))
        if x0_is_x:
            contexts = dataclasses.replace(contexts, x0=xs)

        def work(arrived: Array, chunk: Array, number: Array) -> tuple[Array, Any, Any]:
            """A microbatch through a chunk of this stage's layers."""
            one = functools.partial(lax.dynamic_index_in_dim, index=number, keepdims=False)
            x = jnp.where((here == 0) & (chunk == 0), one(xs), arrived)
            of_chunk = functools.partial(lax.dynamic_index_in_dim, index=chunk if chunks > 1 else 0, keepdims=False)
            chosen, own = jax.tree.map(of_chunk, (params, keys))
            x, losses, updates = layers(x, contexts.map_batch(one), chosen, own, number)
            return x, losses, jax.tree.map(lambda u: jnp.zeros((chunks, *u.shape), u.dtype).at[chunk].set(u), updates)

        if stack.remat is not None or chunks > 1:
            # A layer's parameters are an input of the layer, so that layers alone would save them in every tick.
            remat, also = ("dots_saveable", (SAVED,)) if stack.remat is None else (stack.remat, ())
            saved = policy(remat, (LAYER_INPUT, *also))
            work = jax.checkpoint(work, policy=saved, prevent_cse=False)  # a loop shares nothing with others
        done, (losses, updates) = _run(Schedule(stages, microbatches, chunks), work, xs, here, axes)
        updates = _exchange_chunks(updates, here, axes, stages, back=True)
        updates = jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:]), updates)
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
    y, losses, updates = run_stages(params, keys, x, context)
    return jax.reshard(jnp.reshape(y, shape, out_sharding=spec), x_spec), losses, updates


def _run(
    schedule: Schedule,
    work: Callable[[Array, Array, Array], tuple[Array, Any, Any]],
    xs: Array,
    here: Array,
    axes: tuple[str, ...],
) -> tuple[Array, tuple[Any, Any]]:
    """Microbatches xs [M, B / M, T, D] through this stage, tick by tick.

    work  (output of the stage before, numbers of chunk and microbatch) -> output, losses and updates
    here  number of this stage

    Returns this stage's last outputs, like `xs`, and the sums of losses and updates over microbatches.
    """
    stages = schedule.stages
    following = [(i, (i + 1) % stages) for i in range(stages if schedule.chunks > 1 else stages - 1)]

    def tick(carry: tuple[Array, Array, Any], time: Array) -> tuple[Any, None]:
        arrived, done, sums = carry
        chunk, number, valid = schedule.work(time, here)
        y, *more = work(arrived, chunk, number)
        done = jnp.where(valid, lax.dynamic_update_index_in_dim(done, y, number, 0), done)
        sums = jax.tree.map(lambda total, one: total + jnp.where(valid, one, 0), sums, more)
        return (lax.ppermute(y, axes, following), done, sums), None

    _, *more = jax.eval_shape(work, xs[0], here, here)
    sums = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), more)
    (_, done, (losses, updates)), _ = lax.scan(tick, (xs[0], xs, sums), jnp.arange(schedule.ticks))
    return done, (losses, updates)


def _exchange_chunks(tree: PyTree, here: Array, axes: tuple[str, ...], stages: int, back: bool = False) -> PyTree:
    """Arrays [V, ...] of the V consecutive pieces of the stack that this stage stores -> of those that it computes.
    back: the reverse.

    In each of V rounds every stage sends one piece and receives one: in round r, stage s sends the piece that it stores
    as number (r + s gcd(V, S) // S) mod V, and no two of these are computed by the same stage.
    """

    def exchange(leaf: Array) -> Array:
        chunks = len(leaf)
        stage, turn = np.ogrid[:stages, :chunks]
        stored = (turn + stage * math.gcd(stages, chunks) // stages) % chunks
        computed, to = np.divmod(stage * chunks + stored, stages)
        received = np.empty_like(stored)
        received[to, turn] = computed
        give, take = (received, stored) if back else (stored, received)
        new = jnp.zeros_like(leaf)
        for r in range(chunks):
            pairs = [(b, a) if back else (a, b) for a, b in enumerate(to[:, r].tolist())]
            piece = lax.ppermute(lax.dynamic_index_in_dim(leaf, jnp.asarray(give[:, r])[here]), axes, pairs)
            new = lax.dynamic_update_index_in_dim(new, piece, jnp.asarray(take[:, r])[here], 0)
        return new

    return jax.tree.map(lambda leaf: leaf if len(leaf) == 1 else exchange(leaf), tree)


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
