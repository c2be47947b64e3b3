"""Conversions of config.json fields that many families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.interop.families.family import Fields
from gptjax.nn import (
    GELU,
    MLP,
    Attention,
    BackboneConfig,
    GeGLU,
    LayerOverrides,
    MixtureOfExperts,
    ReLU,
    ReLUSquared,
    SwiGLU,
    TransformerConfig,
)
from gptjax.types import UserError

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Kinds of attention of a layer."""
DENSE = {"gelu_new": GELU(), "gelu": GELU(approximate=False), "relu": ReLU(), "relu2": ReLUSquared()}
GATED = {"silu": SwiGLU(), "gelu_pytorch_tanh": GeGLU(), "gelu": GeGLU(approximate=False)}
ALIASES = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
"""Other names of the same activation functions."""


def sizes(c: Fields, tie_embeddings: bool = False) -> dict[str, Any]:
    """Sizes as fields of `TransformerConfig`. tie_embeddings: default of tie_word_embeddings."""
    heads = c["num_attention_heads"]
    return {
        "vocab": c["vocab_size"],
        "layers": c["num_hidden_layers"],
        "width": c["hidden_size"],
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_size": c.get("head_dim") or c["hidden_size"] // heads,
        "hidden": c["intermediate_size"],
        "tie_embeddings": c.get("tie_word_embeddings", tie_embeddings),
    }


def of_sizes(m: TransformerConfig) -> dict[str, Any]:
    """Sizes as fields of config.json: the inverse of `sizes`."""
    return {
        "vocab_size": m.vocab,
        "num_hidden_layers": m.layers,
        "hidden_size": m.width,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.K,
        "head_dim": m.H,
        "intermediate_size": m.F,
        "tie_word_embeddings": m.tie_embeddings,
    }


def activation(c: Fields, field: str, known: Mapping[str, MLP]) -> MLP:
    """The MLP whose activation is named by the field."""
    name = c[field]
    if name not in known and ALIASES.get(name) in known:
        name = ALIASES[name]
    if name not in known:
        raise UserError(f"config.json: {field}: got {name!r}, must be one of {', '.join(known)}")
    return known[name]


def experts(m: TransformerConfig) -> MixtureOfExperts:
    """The mixture of experts of the layers that have one. Raises UserError if there is none."""
    for block in m.stack().blocks:
        if isinstance(block.mlp, MixtureOfExperts):
            return block.mlp
    raise UserError(f"model.mlp: got {m.mlp}, must be MixtureOfExperts")


def of_activation(mlp: MLP | None, known: Mapping[str, MLP]) -> str:
    """The name of an MLP's activation: the inverse of `activation`. Raises UserError for an unknown MLP."""
    for name, candidate in known.items():
        if candidate == mlp:
            return name
    raise UserError(f"model.mlp: got {mlp}, must be one of {', '.join(map(str, known.values()))}")


def attentions(m: BackboneConfig) -> list[Attention]:
    """The attention part of each layer. Raises UserError where it is another sequence mixer."""
    mixers = [block.attention for block in m.stack().blocks]
    found = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    if len(found) < len(mixers):
        raise UserError("model.attention: got other sequence mixers, must be attention in a family of published models")
    return found


def attention_bias(m: BackboneConfig) -> bool:
    """True if the attention projections have biases."""
    own = m.attention.bias if isinstance(m.attention, Attention) else None
    return m.bias if own is None else own


def repeated(variants: Sequence[LayerOverrides]) -> dict[str, Any]:
    """The shortest `leading_layers` and `pattern` of a `TransformerConfig` that are equivalent to a list of all layers'
    overrides."""
    n = len(variants)
    splits = [(first, period) for period in range(1, n + 1) for first in range(n - period + 1)]
    for first, period in sorted(splits, key=sum):
        if all(variants[i] == variants[i - period] for i in range(first + period, n)):
            return {"leading_layers": tuple(variants[:first]), "pattern": tuple(variants[first : first + period])}
    return {}


def attention_kinds(c: Fields, default: Sequence[str]) -> Sequence[str]:
    """Kind of attention of each layer, `LOCAL` or `GLOBAL`: "layer_types", or else the default."""
    kinds, n = c.get("layer_types"), c["num_hidden_layers"]
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) != n or not all(kind in (LOCAL, GLOBAL) for kind in kinds):
        raise UserError(f"config.json: layer_types: got {kinds!r}, must be {LOCAL} or {GLOBAL} for each of {n} layers")
    return kinds


def layer_types(m: BackboneConfig) -> list[str]:
    """Kind of attention of each layer: the inverse of `attention_kinds`."""
    return [GLOBAL if attention.window is None else LOCAL for attention in attentions(m)]


def window(m: BackboneConfig) -> int | None:
    """The window of the layers that have one, or None."""
    return next((w for attention in attentions(m) if (w := attention.window) is not None), None)
