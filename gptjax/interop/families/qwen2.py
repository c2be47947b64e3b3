"""Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with biases on queries, keys and values, and optional
sliding windows in some layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attention_kinds, layer_types, repeated, window
from gptjax.nn import LayerOverrides, MultiHeadAttention, TransformerConfig
from gptjax.types import UserError


def read(c: Fields) -> TransformerConfig:
    attention = MultiHeadAttention(bias=True, output_bias=False)
    return dataclasses.replace(llama.plain(c), attention=attention, **repeated(windows(c)))


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**llama.of_plain(m), **of_windows(m)}


def windows(c: Fields) -> list[LayerOverrides]:
    """Sliding window of each layer. Older files give the first layer with a window, newer ones list all layers."""
    size = c.get("sliding_window", 4_096) if c.get("use_sliding_window", False) else None
    first = c.or_default("max_window_layers", 28)
    kinds = attention_kinds(c, [GLOBAL if size is None or i < first else LOCAL for i in range(c["num_hidden_layers"])])
    if size is None and LOCAL in kinds:
        raise UserError(f"config.json: layer_types: got {LOCAL}, which needs use_sliding_window and a sliding_window")
    return [LayerOverrides(window=size if kind == LOCAL else None) for kind in kinds]


def of_windows(m: TransformerConfig) -> dict[str, Any]:
    """The fields of config.json for the windows: the inverse of `windows`."""
    size = window(m)
    return {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": layer_types(m)}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, write, llama.TABLE)
