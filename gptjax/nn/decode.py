"""Layer-by-layer execution of a stack: incremental decoding with a cache, and capturing activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gptjax.nn.block import Context
from gptjax.nn.cache import Cache
from gptjax.nn.module import ParamFactory
from gptjax.nn.stack import Stack
from gptjax.types import Array, Params


def decode(
    stack: Stack, param: ParamFactory, params: Mapping[str, Params], x: Array, context: Context, cache: Cache | None
) -> tuple[Array, Cache | None]:
    """x [B, T, D] through the stack -> [B, T, D], and the cache with the new tokens.

    param   captures the blocks' values, and their outputs: "layer_0" and so on
    params  after `stack.unstack`; stacked ones are copied in every call
    cache   None: whole sequences
    """
    entries: list[Any] = [None] * len(stack.blocks) if cache is None else list(cache.layers)
    context = stack.with_first_values(params, x, context, entries[0])
    for i, block in enumerate(stack.blocks):
        variables = {"params": stack.layer(params, i)}
        (x, entries[i]), found = block.apply(variables, x, context, entries[i], mutable=["intermediates"])
        param.capture(f"layer_{i}", dict(found["intermediates"]) | {"output": x})
    if cache is not None:
        real = context.mask.query_segments
        new = x.shape[1] if real is None else (real > 0).sum(1, dtype=jnp.int32)
        cache = dataclasses.replace(cache, layers=tuple(entries), length=cache.length + new)
    return x, cache
