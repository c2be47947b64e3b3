"""Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with biases on queries, keys and values; some layers may
have a sliding window."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import layer_types, repeated, window
from gptjax.nn import LayerOverrides, MultiHeadAttention, TransformerConfig


def read(c: Fields) -> TransformerConfig:
    attention = MultiHeadAttention(bias=True, output_bias=False)
    return dataclasses.replace(llama.plain(c), attention=attention, **repeated(windows(c)))


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**llama.of_plain(m), **of_windows(m)}


def windows(c: Fields) -> list[LayerOverrides]:
    """What a layer sees: older files say from which layer on there is a window, newer ones say it layer by layer."""
    size, n = c.get("sliding_window") if c.get("use_sliding_window", False) else None, c["num_hidden_layers"]
    start = c.get("max_window_layers", n)
    older = ["sliding_attention" if size is not None and i >= start else "full_attention" for i in range(n)]
    types = c.get("layer_types") or older
    return [LayerOverrides(window=size) if kind == "sliding_attention" else LayerOverrides() for kind in types]


def of_windows(m: TransformerConfig) -> dict[str, Any]:
    """`windows` undone."""
    size = window(m)
    return {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": layer_types(m)}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, write, llama.TABLE)
