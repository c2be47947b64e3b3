"""OLMo 2 (arXiv:2501.00656): Llama with norms after the sublayers, and QK-norm over all heads jointly."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import attention_bias
from gptjax.nn import MultiHeadAttention, OutputNorm, RMSNorm, TransformerConfig

NORMS = (
    Row("model.layers.{L}.self_attn.q_norm.weight", "Q", "blocks/{L}/attention/q_norm_scale", "Q"),
    Row("model.layers.{L}.self_attn.k_norm.weight", "P", "blocks/{L}/attention/k_norm_scale", "P"),
    Row("model.layers.{L}.post_attention_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("model.layers.{L}.post_feedforward_layernorm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
)


def read(c: Fields) -> TransformerConfig:
    attention = MultiHeadAttention(
        bias=c.get("attention_bias", False), qk_norm=RMSNorm(c["rms_norm_eps"]), joint_qk_norm=True
    )
    return dataclasses.replace(llama.plain(c), attention=attention, residual=OutputNorm())


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**llama.of_plain(m), "attention_bias": attention_bias(m)}


TABLE = (*llama.ENDS, *llama.ATTENTION, *llama.MLP, *NORMS)
FAMILY = Family("olmo2", "Olmo2ForCausalLM", read, write, TABLE)
