"""Gemma 3, the text model (arXiv:2503.19786): five sliding-window layers, then a global one with its own rotary
positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import gemma2, qwen3
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attention_kinds, attentions, layer_types, repeated
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerOverrides, TransformerConfig
from gptjax.types import UserError


def read(c: Fields) -> TransformerConfig:
    m, n = gemma2.plain(c), c["num_hidden_layers"]
    period = c.get("sliding_window_pattern", 6)
    kinds = attention_kinds(c, [GLOBAL if i % period == period - 1 else LOCAL for i in range(n)])
    given, scaling = (c.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if unknown := given.keys() - {GLOBAL, LOCAL}:
        raise UserError(f"config.json: rope_parameters: got {', '.join(sorted(unknown))}, must be {GLOBAL} and {LOCAL}")
    default = {"rope_type": "default"}
    ropes = {
        GLOBAL: rope(c, {**(given.get(GLOBAL) or default), **scaling}, c.get("rope_theta", 1e6)),
        LOCAL: rope(c, given.get(LOCAL) or default, c.get("rope_local_base_freq", 1e4)),
    }
    local = LayerOverrides(positions=ropes[LOCAL], window=c["sliding_window"])
    return dataclasses.replace(
        m,
        positions=ropes[GLOBAL],
        attention=dataclasses.replace(m.attention, qk_norm=m.norm),
        **repeated([local if kind == LOCAL else LayerOverrides() for kind in kinds]),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    seen = dict(zip(layer_types(m), (attention.positions for attention in attentions(m)), strict=True))
    ropes = {kind: of_rope(seen.get(kind) or m.positions).get("rope_parameters") for kind in (GLOBAL, LOCAL)}
    return {**gemma2.of_plain(m), "rope_parameters": ropes}


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    read,
    write,
    (*gemma2.TABLE, *qwen3.QK_NORMS),
    stem="Gemma3Text",
)
