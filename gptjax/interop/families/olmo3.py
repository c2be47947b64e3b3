"""OLMo 3 (arXiv:2512.13961): OLMo 2 with a sliding window in three of four layers, where RoPE is unscaled."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import olmo2
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attention_kinds, layer_types, repeated, window
from gptjax.interop.families.rope import of_ropes, ropes
from gptjax.nn import LayerOverrides, TransformerConfig
from gptjax.types import UserError

THETA = 500_000.0


def read(c: Fields) -> TransformerConfig:
    kinds = attention_kinds(c, [GLOBAL if i % 4 == 3 else LOCAL for i in range(c["num_hidden_layers"])])
    positions = ropes(c, {GLOBAL: c.get("rope_theta", THETA), LOCAL: THETA})
    stated = ((c.get("rope_parameters") or {}).get(LOCAL) or {}).get("rope_theta")
    if LOCAL in kinds and stated is None and c.get("rope_theta", THETA) != THETA:
        raise UserError(
            f"config.json: rope_theta: got {c['rope_theta']}, which does not say whether {LOCAL} layers have it; put "
            "it into rope_parameters, for each kind of layer"
        )
    whole = {name: value for name, value in c.items() if name not in ("rope_parameters", "rope_scaling")}
    local = LayerOverrides(positions=positions[LOCAL], window=c.or_default("sliding_window", 4_096))
    return dataclasses.replace(
        olmo2.read(Fields(whole)),
        positions=positions[GLOBAL],
        **repeated([local if kind == LOCAL else LayerOverrides() for kind in kinds]),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**olmo2.write(m), **of_ropes(m), "layer_types": layer_types(m), "sliding_window": window(m) or 4_096}


FAMILY = Family("olmo3", "Olmo3ForCausalLM", read, write, olmo2.TABLE)
