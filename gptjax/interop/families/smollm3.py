"""SmolLM 3 (huggingface.co/HuggingFaceTB/SmolLM3-3B): Llama without position encoding in every fourth layer (NoPE,
arXiv:2501.18795), and optional sliding windows in these layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attention_kinds, attentions, repeated
from gptjax.interop.families.qwen2 import of_windows
from gptjax.nn import LayerOverrides, Positions, RoPE, TransformerConfig
from gptjax.types import UserError


def read(c: Fields) -> TransformerConfig:
    n = c["num_hidden_layers"]
    m = llama.read(Fields({"tie_word_embeddings": True, "rope_theta": 2_000_000.0, **c}))
    period, rotary = c.or_default("no_rope_layer_interval", 4), c.get("no_rope_layers")
    if rotary is None:
        rotary = [(i + 1) % period for i in range(n)]
    if len(rotary) < n:
        raise UserError(f"config.json: no_rope_layers: got {len(rotary)} numbers, must be one for each of {n} layers")
    window = c.get("sliding_window") if c.get("use_sliding_window", False) else None
    kinds = attention_kinds(c, [GLOBAL if window is None or rotary[i] else LOCAL for i in range(n)])
    if window is None and LOCAL in kinds:
        raise UserError(f"config.json: layer_types: got {LOCAL}, which needs use_sliding_window and a sliding_window")
    variants = [
        LayerOverrides(positions=None if rotary[i] else Positions(), window=window if kinds[i] == LOCAL else None)
        for i in range(n)
    ]
    return dataclasses.replace(m, **repeated(variants))


def write(m: TransformerConfig) -> dict[str, Any]:
    rotary = [int(isinstance(attention.positions, RoPE)) for attention in attentions(m)]
    return {**llama.write(m), **of_windows(m), "no_rope_layers": rotary}


FAMILY = Family("smollm3", "SmolLM3ForCausalLM", read, write, llama.TABLE)
