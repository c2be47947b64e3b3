"""Phi-3 and Phi-4 (arXiv:2404.14219): Llama with merged projections and an optional sliding window in every layer."""

from __future__ import annotations

import dataclasses

from gptjax.interop.families import llama, mistral
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.nn import MultiHeadAttention, TransformerConfig

JOINED = (
    Row("model.layers.{L}.self_attn.qkv_proj.weight", "([N]+K+K H) D", "blocks/{L}/attention/q", "D N H"),
    Row("model.layers.{L}.self_attn.qkv_proj.weight", "(N+[K]+K H) D", "blocks/{L}/attention/k", "D K H"),
    Row("model.layers.{L}.self_attn.qkv_proj.weight", "(N+K+[K] H) D", "blocks/{L}/attention/v", "D K H"),
    Row("model.layers.{L}.self_attn.o_proj.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("model.layers.{L}.mlp.gate_up_proj.weight", "([F]+F) D", "blocks/{L}/mlp/gate", "D F"),
    Row("model.layers.{L}.mlp.gate_up_proj.weight", "(F+[F]) D", "blocks/{L}/mlp/up", "D F"),
    Row("model.layers.{L}.mlp.down_proj.weight", "D F", "blocks/{L}/mlp/down", "F D"),
)


def read(c: Fields) -> TransformerConfig:
    c = Fields({"original_max_position_embeddings": 4_096, **c})
    attention = MultiHeadAttention(window=c.get("sliding_window"))
    return dataclasses.replace(llama.plain(c, fraction=1.0), attention=attention)


TABLE = (*llama.ENDS, *JOINED, *llama.NORMS)
FAMILY = Family("phi3", "Phi3ForCausalLM", read, mistral.write, TABLE)
