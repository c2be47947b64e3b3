"""Command R and Aya (github.com/huggingface/transformers, models/cohere): attention and MLP in parallel after one norm,
which has no bias, and rotary positions that pair neighbours. Command R+ normalises queries and keys too."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, attention_bias, of_activation, of_sizes, sizes
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerNorm, MultiHeadAttention, Parallel, TransformerConfig

TABLE = (
    *(*llama.ENDS, *llama.ATTENTION, *llama.MLP),
    Row("model.layers.{L}.input_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("model.layers.{L}.self_attn.q_norm.weight", "N H", "blocks/{L}/attention/q_norm_scale", "N H"),
    Row("model.layers.{L}.self_attn.k_norm.weight", "K H", "blocks/{L}/attention/k_norm_scale", "K H"),
)
THETA = 500_000.0


def read(c: Fields) -> TransformerConfig:
    m = plain(c, THETA)
    if not c.get("use_qk_norm", False):
        return m
    qk_norm = dataclasses.replace(m.norm, per_head=True)
    return dataclasses.replace(m, attention=dataclasses.replace(m.attention, qk_norm=qk_norm))


def write(m: TransformerConfig) -> dict[str, Any]:
    normalised = isinstance(m.attention, MultiHeadAttention) and m.attention.qk_norm is not None
    return {**of_plain(m), "use_qk_norm": normalised}


def plain(c: Fields, theta: float = 10_000.0) -> TransformerConfig:
    """The configuration that Cohere's models share. theta: default base of the rotary positions."""
    return TransformerConfig(
        **sizes(c, tie_embeddings=True),
        positions=dataclasses.replace(rope(c, theta=theta), interleaved=True),
        norm=LayerNorm(c["layer_norm_eps"], bias=False),
        attention=MultiHeadAttention(bias=c.get("attention_bias", False)),
        mlp=activation(c, "hidden_act", GATED),
        residual=Parallel(shared=True),
        logit_scale=c.or_default("logit_scale", 0.0625),
    )


def of_plain(m: TransformerConfig) -> dict[str, Any]:
    """The fields of config.json: the inverse of `plain`."""
    return {
        **of_sizes(m),
        **of_rope(m.positions),
        "layer_norm_eps": m.norm.eps,
        "attention_bias": attention_bias(m),
        "hidden_act": of_activation(m.mlp, GATED),
        "logit_scale": m.logit_scale / m.width_multiplier,
    }


FAMILY = Family("cohere", "CohereForCausalLM", read, write, TABLE, classifier=None)
