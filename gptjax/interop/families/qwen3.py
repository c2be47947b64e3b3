"""Qwen 3 (arXiv:2505.09388): Llama with QK-norm and a head size independent of the width."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama, qwen2
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import attention_bias, repeated
from gptjax.nn import MultiHeadAttention, RMSNorm, TransformerConfig

QK_NORMS = (
    Row("model.layers.{L}.self_attn.q_norm.weight", "H", "blocks/{L}/attention/q_norm_scale", "H"),
    Row("model.layers.{L}.self_attn.k_norm.weight", "H", "blocks/{L}/attention/k_norm_scale", "H"),
)


def read(c: Fields) -> TransformerConfig:
    m = llama.plain(Fields({"head_dim": 128, **c}))
    return dataclasses.replace(m, attention=attention(c), **repeated(qwen2.windows(c)))


def attention(c: Fields, window: int | None = None) -> MultiHeadAttention:
    """Attention with QK-norm."""
    bias, norm = c.get("attention_bias", False), RMSNorm(c["rms_norm_eps"])
    return MultiHeadAttention(bias=bias, qk_norm=norm, window=window)


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**llama.of_plain(m), **qwen2.of_windows(m), "attention_bias": attention_bias(m)}


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, write, (*llama.TABLE, *QK_NORMS))
