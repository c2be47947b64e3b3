"""Execution of a stack on whole sequences, for training and evaluation: `lax.scan` over its stacked parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels import target
from gptjax.nn.block import Block, Context
from gptjax.nn.remat import LAYER_INPUT, Remat, rematerialised
from gptjax.nn.stack import Stack
from gptjax.types import Array, Key, Params, PyTree

MAX_UNROLL = {"cpu": 12, "gpu": 48, "tpu": 12}
"""Platform -> maximum depth of an unrolled scan. A loop copies every activation that it saves into an array of all
layers: 8 to 15 % of a training step on a CPU, 15 % on an H200. More layers take longer to compile."""


def scan(
    stack: Stack, params: Mapping[str, Params], x: Array, context: Context, key: Key | None = None
) -> tuple[Array, dict[str, Array], Params]:
    """x [B, T, D] through the stack -> [B, T, D], the blocks' losses summed over layers, and their updates
    (`ParamFactory.update`), a subtree of `params`.

    params  as `stack.init` returns them
    key     for dropout. None: no dropout
    """
    context = stack.with_first_values(params, x, context)
    first, middle, last = (None,) * 3 if key is None else jax.random.split(key, 3)
    unroll = stack.repeats * len(stack.pattern) <= MAX_UNROLL.get(target.backend(), 12)
    pattern = functools.partial(_layers, stack.named_pattern, stack.remat)

    x, (first_losses, updates) = _layers(stack.named_leading, stack.remat, context, x, (params, first))
    losses = [first_losses]
    if stack.repeats:
        stacked = stack.repeated(params)
        keys = None if middle is None else jax.random.split(middle, stack.repeats)
        if stack.rules.mesh_axes("layers"):
            from gptjax.nn.pipeline import pipeline

            run = functools.partial(_stage, pattern, unroll)
            x, more, new = pipeline(run, stack, stacked, keys, x, context)
        else:
            x, (more, new) = lax.scan(functools.partial(pattern, context), x, (stacked, keys), unroll=unroll)
        losses.append(more)
        updates |= new
    x, (more, new) = _layers(stack.named_trailing, stack.remat, context, x, (params, last))
    return x, _sums([*losses, more]), updates | new


def _layers(
    blocks: Mapping[str, Block], remat: Remat, context: Context, x: Array, layer: tuple[Params, Key | None]
) -> tuple[Array, tuple[list[Any], dict[str, Any]]]:
    """x through blocks, named by their parameters ("": all of them), and their losses and updates."""
    params, key = layer
    losses, updates = [], {}
    for i, (name, block) in enumerate(blocks.items()):
        own = key if key is None or not name else jax.random.fold_in(key, i)
        rngs = None if own is None else {"dropout": own}
        forward = rematerialised(functools.partial(block.apply, mutable=["losses", "updates"]), remat)
        # Under a second name, which no policy saves: jax saves a value again for every checkpoint inside that reads it.
        x = checkpoint_name(checkpoint_name(x, LAYER_INPUT), "layer")
        (x, _), reported = forward({"params": params[name] if name else params}, x, context, rngs=rngs)
        losses.append(reported.get("losses", {}))
        new = reported.get("updates", {})
        updates |= {name: new} if name and new else new
    return x, (losses, updates)


def _stage(
    pattern: Callable[..., Any],
    unroll: bool,
    x: Array,
    context: Context,
    params: Params,
    keys: Key | None,
    number: Array,
) -> tuple[Array, dict[str, Array], dict[str, Any]]:
    """Microbatch `number` through a chunk of a pipeline stage's layers."""
    keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    x, (losses, updates) = lax.scan(functools.partial(pattern, context), x, (params, keys), unroll=unroll)
    return x, _sums(losses), updates


def _sums(sown: PyTree) -> dict[str, Array]:
    """Sums over layers, by name."""
    totals: dict[str, Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        name = path[-1].key
        totals[name] = totals.get(name, 0.0) + jnp.sum(value)
    return totals
