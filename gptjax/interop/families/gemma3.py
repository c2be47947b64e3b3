"""Gemma 3, the text model (arXiv:2503.19786): five sliding-window layers, then a global one with its own rotary
positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import gemma2, qwen3
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import attentions, layer_types, repeated
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerOverrides, TransformerConfig


def read(c: Fields) -> TransformerConfig:
    m, n = gemma2.plain(c), c["num_hidden_layers"]
    period = c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
    types = c.get("layer_types") or [GLOBAL if i % period == period - 1 else LOCAL for i in range(n)]
    older = {
        GLOBAL: {"rope_theta": c.get("rope_theta", 1e6), **(c.get("rope_scaling") or {})},
        LOCAL: {"rope_theta": c.get("rope_local_base_freq", 1e4)},
    }
    ropes = {kind: rope(c, given) for kind, given in (c.get("rope_parameters") or older).items()}
    local = LayerOverrides(positions=ropes[LOCAL], window=c["sliding_window"])
    return dataclasses.replace(
        m,
        positions=ropes[GLOBAL],
        attention=dataclasses.replace(m.attention, qk_norm=m.norm),
        **repeated([local if kind == LOCAL else LayerOverrides() for kind in types]),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    seen = dict(zip(layer_types(m), (attention.positions for attention in attentions(m)), strict=True))
    ropes = {kind: of_rope(seen.get(kind) or m.positions).get("rope_parameters") for kind in (GLOBAL, LOCAL)}
    return {**gemma2.of_plain(m), "rope_parameters": ropes}


LOCAL, GLOBAL = "sliding_attention", "full_attention"
FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    read,
    write,
    (*gemma2.TABLE, *qwen3.QK_NORMS),
    stem="Gemma3Text",
)
