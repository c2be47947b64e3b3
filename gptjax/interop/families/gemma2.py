"""Gemma 2 (arXiv:2408.00118): norms before and after each sublayer, soft-capped scores and logits, sliding windows."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import (
    GATED,
    GLOBAL,
    LOCAL,
    activation,
    attention_bias,
    attention_kinds,
    layer_types,
    of_activation,
    of_sizes,
    repeated,
    sizes,
    window,
)
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerOverrides, MultiHeadAttention, RMSNorm, SandwichNorm, TransformerConfig

NORMS = (
    Row("model.layers.{L}.input_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("model.layers.{L}.post_attention_layernorm.weight", "D", "blocks/{L}/post_norm_1/scale", "D"),
    Row("model.layers.{L}.pre_feedforward_layernorm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("model.layers.{L}.post_feedforward_layernorm.weight", "D", "blocks/{L}/post_norm_2/scale", "D"),
)


def read(c: Fields) -> TransformerConfig:
    c = Fields({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **c})
    kinds = attention_kinds(c, [(LOCAL, GLOBAL)[i % 2] for i in range(c["num_hidden_layers"])])
    local = LayerOverrides(window=c["sliding_window"])
    variants = [local if kind == LOCAL else LayerOverrides() for kind in kinds]
    return dataclasses.replace(plain(c), positions=rope(c), **repeated(variants))


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**of_plain(m), **of_rope(m.positions)}


def plain(c: Fields) -> TransformerConfig:
    """The configuration that Gemma 2 and 3 share."""
    c = Fields({"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", **c})
    c.only(use_bidirectional_attention=False)
    return TransformerConfig(
        **sizes(c, tie_embeddings=True),
        norm=RMSNorm(c["rms_norm_eps"], plus_one=True),
        attention=MultiHeadAttention(
            bias=c.get("attention_bias", False),
            scale=c["query_pre_attn_scalar"] ** -0.5,
            softcap=c.get("attn_logit_softcapping"),
        ),
        mlp=activation(c, "hidden_activation", GATED),
        residual=SandwichNorm(),
        embedding_scale=c["hidden_size"] ** 0.5,
        logit_softcap=c.get("final_logit_softcapping"),
    )


def of_plain(m: TransformerConfig) -> dict[str, Any]:
    """The fields of config.json that Gemma 2 and 3 share: the inverse of `plain`."""
    attention = m.attention if isinstance(m.attention, MultiHeadAttention) else MultiHeadAttention()
    scale = attention.scale or m.H**-0.5
    return {
        **of_sizes(m),
        "rms_norm_eps": m.norm.eps,
        "attention_bias": attention_bias(m),
        "query_pre_attn_scalar": round(scale**-2) if round(scale**-2) ** -0.5 == scale else scale**-2,
        "attn_logit_softcapping": attention.softcap,
        "hidden_activation": of_activation(m.mlp, GATED),
        "final_logit_softcapping": m.logit_softcap,
        "layer_types": layer_types(m),
        "sliding_window": window(m) or 4_096,
    }


TABLE = (*llama.ENDS, *llama.ATTENTION, *llama.MLP, *NORMS)
FAMILY = Family("gemma2", "Gemma2ForCausalLM", read, write, TABLE)
