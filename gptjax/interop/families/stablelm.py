"""StableLM (github.com/Stability-AI/StableLM) and StableLM 2 (arXiv:2402.17834): Llama with layer norms and rotary
positions in a quarter of each head; StableLM 2 12B has parallel layers, and normalises queries and keys by head."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, attention_bias, of_activation, of_sizes, sizes
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerNorm, MultiHeadAttention, Parallel, PreNorm, TransformerConfig

TABLE = (
    *(*llama.ENDS, *llama.ATTENTION, *llama.MLP, *llama.NORMS),
    Row("model.norm.bias", "D", "norm/bias", "D"),
    Row("model.layers.{L}.input_layernorm.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("model.layers.{L}.post_attention_layernorm.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("model.layers.{L}.self_attn.q_layernorm.norms.{N}.weight", "H", "blocks/{L}/attention/q_norm_scale", "N H"),
    Row("model.layers.{L}.self_attn.k_layernorm.norms.{K}.weight", "H", "blocks/{L}/attention/k_norm_scale", "K H"),
)
FRACTION = 0.25


def read(c: Fields) -> TransformerConfig:
    c.only(head_dim=c["hidden_size"] // c["num_attention_heads"])
    eps = c["layer_norm_eps"]
    qk_norm = LayerNorm(eps, bias=False, per_head=True) if c.get("qk_layernorm", False) else None
    return TransformerConfig(
        **sizes(c),
        positions=rope(c, fraction=FRACTION),
        norm=LayerNorm(eps),
        attention=MultiHeadAttention(bias=c.get("use_qkv_bias", False), output_bias=False, qk_norm=qk_norm),
        mlp=activation(c, "hidden_act", GATED),
        residual=Parallel(shared=True) if c.get("use_parallel_residual", False) else PreNorm(),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    normalised = isinstance(m.attention, MultiHeadAttention) and m.attention.qk_norm is not None
    return {
        **of_sizes(m),
        **of_rope(m.positions, fraction=FRACTION),
        "layer_norm_eps": m.norm.eps,
        "hidden_act": of_activation(m.mlp, GATED),
        "use_qkv_bias": attention_bias(m),
        "qk_layernorm": normalised,
        "use_parallel_residual": isinstance(m.residual, Parallel),
    }


FAMILY = Family("stablelm", "StableLmForCausalLM", read, write, TABLE)
