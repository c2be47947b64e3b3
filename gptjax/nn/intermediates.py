"""Activations of every layer of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.nn.transformer import Transformer, unstack
from gptjax.types import Array, Params


def activations(model: Transformer, params: Params, *args: Any, **kwargs: Any) -> dict[str, Array]:
    """Intermediate values of `model.apply({"params": params}, *args, **kwargs)` by name, in order of computation:

    positions                                                           embeddings with positions, [B, T, D]
    layer_0/norm_1  layer_0/attention  layer_0/norm_2  layer_0/mlp      outputs of the parts of a block, [B, T, D]
    layer_0                                                             residual stream after the block, [B, T, D]
    norm                                                                output of the final norm, [B, T, D]
    logits                                                              [B, T, V]

    Runs the layers one by one. A pure function: it can be jitted and differentiated.
    """
    variables = {"params": unstack(model.config, params)}
    (logits, _), found = model.apply(variables, *args, mutable=["intermediates"], **kwargs)
    return {**dict(_outputs(found["intermediates"])), "logits": logits}


def _outputs(captured: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Array]]:
    """Name and value of captured values named "output" or "..._output"."""
    for name, value in captured.items():
        if isinstance(value, Mapping):
            yield from _outputs(value, path if name == "blocks" else f"{path}{name}/")
        elif name == "output":
            yield path.removesuffix("/"), value
        elif name.endswith("_output"):
            yield path + name.removesuffix("_output"), value
