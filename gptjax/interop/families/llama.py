"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), and models with the same architecture. Many families extend this
one and reuse its tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, attention_bias, of_activation, of_sizes, sizes
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import MultiHeadAttention, RMSNorm, TransformerConfig

ENDS = (
    Row("model.embed_tokens.weight", "V D", "embedding", "V D"),
    Row("model.norm.weight", "D", "norm/scale", "D"),
    Row("lm_head.weight", "V D", "head", "D V"),
    Row("score.weight", "Y D", "classifier", "D Y"),
    Row("score.weight", "Y D", "token_classifier", "D Y"),
    Row("score.bias", "Y", "token_classifier_bias", "Y"),
)
ATTENTION = (
    Row("model.layers.{L}.self_attn.q_proj.weight", "(N H) D", "blocks/{L}/attention/q", "D N H"),
    Row("model.layers.{L}.self_attn.k_proj.weight", "(K H) D", "blocks/{L}/attention/k", "D K H"),
    Row("model.layers.{L}.self_attn.v_proj.weight", "(K H) D", "blocks/{L}/attention/v", "D K H"),
    Row("model.layers.{L}.self_attn.o_proj.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("model.layers.{L}.self_attn.q_proj.bias", "(N H)", "blocks/{L}/attention/q_bias", "N H"),
    Row("model.layers.{L}.self_attn.k_proj.bias", "(K H)", "blocks/{L}/attention/k_bias", "K H"),
    Row("model.layers.{L}.self_attn.v_proj.bias", "(K H)", "blocks/{L}/attention/v_bias", "K H"),
    Row("model.layers.{L}.self_attn.o_proj.bias", "D", "blocks/{L}/attention/o_bias", "D"),
)
MLP = (
    Row("model.layers.{L}.mlp.gate_proj.weight", "F D", "blocks/{L}/mlp/gate", "D F"),
    Row("model.layers.{L}.mlp.up_proj.weight", "F D", "blocks/{L}/mlp/up", "D F"),
    Row("model.layers.{L}.mlp.down_proj.weight", "D F", "blocks/{L}/mlp/down", "F D"),
    Row("model.layers.{L}.mlp.gate_proj.bias", "F", "blocks/{L}/mlp/gate_bias", "F"),
    Row("model.layers.{L}.mlp.up_proj.bias", "F", "blocks/{L}/mlp/up_bias", "F"),
    Row("model.layers.{L}.mlp.down_proj.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
)
NORMS = (
    Row("model.layers.{L}.input_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("model.layers.{L}.post_attention_layernorm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
)


def read(c: Fields) -> TransformerConfig:
    attention = MultiHeadAttention(bias=c.get("attention_bias", False))
    return dataclasses.replace(plain(c), attention=attention, bias=c.get("mlp_bias", False))


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**of_plain(m), "attention_bias": attention_bias(m), "mlp_bias": m.bias}


def plain(c: Fields, fraction: float | None = None) -> TransformerConfig:
    """A Llama without biases, which other families extend. fraction: see `rope`."""
    return TransformerConfig(
        **sizes(c),
        positions=rope(c, fraction=fraction),
        norm=RMSNorm(c["rms_norm_eps"]),
        mlp=activation(c, "hidden_act", GATED),
    )


def of_plain(m: TransformerConfig) -> dict[str, Any]:
    """The fields of config.json: the inverse of `plain`."""
    activation = of_activation(m.mlp, GATED)
    return {**of_sizes(m), **of_rope(m.positions), "rms_norm_eps": m.norm.eps, "hidden_act": activation}


TABLE = (*ENDS, *ATTENTION, *MLP, *NORMS)
FAMILY = Family("llama", "LlamaForCausalLM", read, write, TABLE)
