"""Gemma 1 and CodeGemma (arXiv:2403.08295): Llama with GeGLU, scaled embeddings and norms scaled by 1 + parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import attention_bias
from gptjax.nn import MultiHeadAttention, RMSNorm, TransformerConfig

GELU = "gelu_pytorch_tanh"


def read(c: Fields) -> TransformerConfig:
    c = Fields({"head_dim": 256, "hidden_act": GELU, "tie_word_embeddings": True, **c})
    c.only(hidden_activation=GELU, use_bidirectional_attention=False)
    if c["hidden_act"] == "gelu":  # the first files said so and meant the approximation
        c["hidden_act"] = GELU
    return dataclasses.replace(
        llama.plain(c),
        norm=RMSNorm(c["rms_norm_eps"], plus_one=True),
        attention=MultiHeadAttention(bias=c.get("attention_bias", False)),
        embedding_scale=c["hidden_size"] ** 0.5,
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**llama.of_plain(m), "attention_bias": attention_bias(m)}


FAMILY = Family("gemma", "GemmaForCausalLM", read, write, llama.TABLE)
