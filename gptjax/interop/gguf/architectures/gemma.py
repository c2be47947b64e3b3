"""Gemma 2 and 3: norms that multiply by 1 + scale, sliding windows in a periodic pattern of layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL
from gptjax.interop.gguf import rope
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, Row, expanded
from gptjax.interop.gguf.architectures import llama, qwen
from gptjax.types import UserError

NORMS = tuple(
    expanded(
        {
            "input_layernorm.weight": "attn_norm.weight",
            "post_attention_layernorm.weight": "post_attention_norm.weight",
            "pre_feedforward_layernorm.weight": "ffn_norm.weight",
            "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
        },
        *llama.LAYER,
    )
)
ROWS = (*llama.ENDS, *llama.ATTENTION, *llama.MLP, *NORMS)


def shifted(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(dataclasses.replace(row, shift=1.0) if "norm" in row.name else row for row in rows)


def pattern(c: Fields, default: int) -> Metadata:
    """The keys of the sliding window: every `period`-th layer is global, the others are local; 0: all are local."""
    kinds, period = c["layer_types"], c["num_hidden_layers"] + 1
    found = next((p for p in (default, *range(1, period), 0) if kinds == of_pattern(p, len(kinds))), None)
    if found is None or LOCAL not in kinds:
        raise UserError(f"layer_types: got {', '.join(kinds)[:100]}, must be periodic: n local, then one global")
    more = {} if found == default else {"attention.sliding_window_pattern": found}
    return {"attention.sliding_window": c["sliding_window"], **more}


def of_pattern(period: int, layers: int) -> list[str]:
    return [LOCAL if period == 0 or i % period < period - 1 else GLOBAL for i in range(layers)]


def read_pattern(keys: Keys, layers: int, default: int) -> dict[str, Any]:
    """The fields of config.json: the inverse of `pattern`."""
    period = keys.integer("attention.sliding_window_pattern", default)
    window = keys.integer("attention.sliding_window")
    if layers > 1 << 16:
        raise UserError(f"{keys.architecture}.block_count: got {layers}, must be at most 65,536")
    return {"sliding_window": window, "layer_types": of_pattern(period, layers)}


def shared(keys: Keys, fields: dict[str, Any], largest: int) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share. Scores are divided by the root of the head size; in the model of `largest`
    layers, 27B, by that of the width per head."""
    heads, size = fields["num_attention_heads"], fields["head_dim"]
    scale = fields["hidden_size"] // max(heads, 1) if fields["num_hidden_layers"] == largest else size
    return {
        **{key: value for key, value in fields.items() if key != "hidden_act"},
        "query_pre_attn_scalar": scale,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def write_2(c: Fields) -> Metadata:
    if not c["tie_word_embeddings"]:
        raise UserError("tie_word_embeddings: got False, must be True for a GGUF file of architecture gemma2")
    caps = {
        "attn_logit_softcapping": c["attn_logit_softcapping"],
        "final_logit_softcapping": c["final_logit_softcapping"],
    }
    return {**llama.rotary(c), **{key: float(cap) for key, cap in caps.items()}, **pattern(c, 2)}


def read_2(keys: Keys) -> dict[str, Any]:
    fields = llama.of_rotary(keys)
    return {
        **shared(keys, fields, largest=46),
        "model_type": "gemma2",
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        **read_pattern(keys, fields["num_hidden_layers"], 2),
    }


def write_3(c: Fields) -> Metadata:
    ropes = c["rope_parameters"]
    local = ropes[LOCAL]
    if local["rope_type"] != "default":
        raise UserError(f"rope_parameters: got {local['rope_type']} for {LOCAL}, must be default in a GGUF file")
    keys = {**llama.plain(c), "rope.dimension_count": c["head_dim"], **rope.write(ropes[GLOBAL])}
    return {**keys, "rope.freq_base_swa": float(local["rope_theta"]), **pattern(c, 6)}


def read_3(keys: Keys) -> dict[str, Any]:
    fields = llama.of_rotary(keys)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)}
    return {
        **shared(keys, fields, largest=62),
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_parameters": {GLOBAL: fields["rope_parameters"], LOCAL: local},
        **read_pattern(keys, fields["num_hidden_layers"], 6),
    }


GEMMA2 = Architecture("gemma2", ("gemma2",), shifted(ROWS), write_2, read_2, windows=True)
GEMMA3 = Architecture("gemma3", ("gemma3_text",), shifted((*ROWS, *qwen.QK_NORMS)), write_3, read_3, windows=True)
