"""StarCoder 2 (arXiv:2402.19173): layer norms and biases, grouped queries, rotary positions and an optional sliding
window in every layer."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import DENSE, activation, of_activation, of_sizes, sizes, window
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import GELU, LayerNorm, MultiHeadAttention, TransformerConfig

NORMS = (
    *llama.NORMS,
    Row("model.layers.{L}.input_layernorm.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("model.layers.{L}.post_attention_layernorm.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("model.norm.bias", "D", "norm/bias", "D"),
)
MLP = (
    Row("model.layers.{L}.mlp.c_fc.weight", "F D", "blocks/{L}/mlp/up", "D F"),
    Row("model.layers.{L}.mlp.c_fc.bias", "F", "blocks/{L}/mlp/up_bias", "F"),
    Row("model.layers.{L}.mlp.c_proj.weight", "D F", "blocks/{L}/mlp/down", "F D"),
    Row("model.layers.{L}.mlp.c_proj.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
)

ACTIVATIONS = {"gelu_pytorch_tanh": GELU(), **DENSE}


def read(c: Fields) -> TransformerConfig:
    return TransformerConfig(
        **sizes(c, tie_embeddings=True),
        positions=rope(c),
        norm=LayerNorm(c["norm_epsilon"]),
        attention=MultiHeadAttention(window=c.get("sliding_window")),
        mlp=activation(c, "hidden_act", ACTIVATIONS),
        bias=c.get("use_bias", True),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {
        **of_sizes(m),
        **of_rope(m.positions),
        "norm_epsilon": m.norm.eps,
        "sliding_window": window(m),
        "hidden_act": of_activation(m.mlp, ACTIVATIONS),
        "use_bias": m.bias,
    }


TABLE = (*llama.ENDS, *llama.ATTENTION, *MLP, *NORMS)
FAMILY = Family("starcoder2", "Starcoder2ForCausalLM", read, write, TABLE)
