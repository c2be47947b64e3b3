"""What every layer of a model puts out, to look inside."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn

from gptjax.nn.block import Block
from gptjax.nn.module import Layer
from gptjax.nn.transformer import Transformer, unstack
from gptjax.types import Array, Params


def activations(model: Transformer, params: Params, *args: Any, **kwargs: Any) -> dict[str, Array]:
    """What `model.apply({"params": params}, *args, **kwargs)` computes on its way, by name, in the order in which it is
    computed:

    positions                                                           the embeddings, with positions, [B, T, D]
    layer_0/norm_1  layer_0/attention  layer_0/norm_2  layer_0/mlp      what the parts of a block put out, [B, T, D]
    layer_0                                                             the residual stream after it, [B, T, D]
    norm                                                                the last norm, [B, T, D]
    logits                                                              [B, T, V]

    Runs the layers one by one. A pure function: it can be jitted and differentiated.
    """
    found: dict[str, Array] = {}
    blocks = itertools.count()
    inside = ""

    def record(function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Block | Layer):
            return function(*args, **kwargs)
        if module.is_mutable_collection("kept"):  # the first layer, which runs for its values before it runs
            return function(*args, **kwargs)
        if isinstance(module, Block):
            name = inside = f"layer_{next(blocks)}"
            out = function(*args, **kwargs)
            inside = ""
        else:
            name = "/".join((inside, *module.path) if inside else module.path)
            out = function(*args, **kwargs)
        output = out[0] if isinstance(out, tuple) else out
        if output is not None:
            found[name] = output
        return out

    with nn.intercept_methods(record):
        found["logits"] = model.apply({"params": unstack(model.config, params)}, *args, **kwargs)[0]
    return found
