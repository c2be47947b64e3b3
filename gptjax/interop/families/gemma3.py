"""Gemma 3, the text model (arXiv:2503.19786): five sliding-window layers, then a global one with its own rotary
positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import gemma2, qwen3
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attention_kinds, repeated
from gptjax.interop.families.rope import of_ropes, ropes
from gptjax.nn import LayerOverrides, TransformerConfig


def read(c: Fields) -> TransformerConfig:
    m, n = gemma2.plain(c), c["num_hidden_layers"]
    period = c.get("sliding_window_pattern", 6)
    kinds = attention_kinds(c, [GLOBAL if i % period == period - 1 else LOCAL for i in range(n)])
    positions = ropes(c, {GLOBAL: c.get("rope_theta", 1e6), LOCAL: c.get("rope_local_base_freq", 1e4)})
    local = LayerOverrides(positions=positions[LOCAL], window=c["sliding_window"])
    return dataclasses.replace(
        m,
        positions=positions[GLOBAL],
        attention=dataclasses.replace(m.attention, qk_norm=m.norm),
        **repeated([local if kind == LOCAL else LayerOverrides() for kind in kinds]),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**gemma2.of_plain(m), **of_ropes(m)}


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    read,
    write,
    (*gemma2.TABLE, *qwen3.QK_NORMS),
    stem="Gemma3Text",
)
