"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373): parallel attention and MLP, rotary positions in a quarter
of each head."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import DENSE, activation, attention_bias, of_activation, of_sizes, sizes
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerNorm, MultiHeadAttention, Parallel, PreNorm, RoPE, TransformerConfig

TABLE = (  # each head's queries, keys and values are contiguous
    Row("gpt_neox.embed_in.weight", "V D", "embedding", "V D"),
    Row("gpt_neox.layers.{L}.input_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("gpt_neox.layers.{L}.input_layernorm.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("gpt_neox.layers.{L}.post_attention_layernorm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("gpt_neox.layers.{L}.post_attention_layernorm.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("gpt_neox.layers.{L}.attention.query_key_value.weight", "(N [H]+H+H) D", "blocks/{L}/attention/q", "D N H"),
    Row("gpt_neox.layers.{L}.attention.query_key_value.weight", "(N H+[H]+H) D", "blocks/{L}/attention/k", "D N H"),
    Row("gpt_neox.layers.{L}.attention.query_key_value.weight", "(N H+H+[H]) D", "blocks/{L}/attention/v", "D N H"),
    Row("gpt_neox.layers.{L}.attention.query_key_value.bias", "(N [H]+H+H)", "blocks/{L}/attention/q_bias", "N H"),
    Row("gpt_neox.layers.{L}.attention.query_key_value.bias", "(N H+[H]+H)", "blocks/{L}/attention/k_bias", "N H"),
    Row("gpt_neox.layers.{L}.attention.query_key_value.bias", "(N H+H+[H])", "blocks/{L}/attention/v_bias", "N H"),
    Row("gpt_neox.layers.{L}.attention.dense.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("gpt_neox.layers.{L}.attention.dense.bias", "D", "blocks/{L}/attention/o_bias", "D"),
    Row("gpt_neox.layers.{L}.mlp.dense_h_to_4h.weight", "F D", "blocks/{L}/mlp/up", "D F"),
    Row("gpt_neox.layers.{L}.mlp.dense_h_to_4h.bias", "F", "blocks/{L}/mlp/up_bias", "F"),
    Row("gpt_neox.layers.{L}.mlp.dense_4h_to_h.weight", "D F", "blocks/{L}/mlp/down", "F D"),
    Row("gpt_neox.layers.{L}.mlp.dense_4h_to_h.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
    Row("gpt_neox.final_layer_norm.weight", "D", "norm/scale", "D"),
    Row("gpt_neox.final_layer_norm.bias", "D", "norm/bias", "D"),
    Row("embed_out.weight", "V D", "head", "D V"),
    Row("score.weight", "Y D", "classifier", "D Y"),
)


def read(c: Fields) -> TransformerConfig:
    c = Fields({name: value for name, value in c.items() if name not in UNUSED})
    return TransformerConfig(
        **sizes(c),
        positions=rope(c, theta=c.get("rotary_emb_base", 1e4), fraction=c.or_default("rotary_pct", 0.25)),
        norm=LayerNorm(c["layer_norm_eps"]),
        attention=MultiHeadAttention(bias=c.get("attention_bias", True)),
        mlp=activation(c, "hidden_act", DENSE),
        residual=Parallel() if c.get("use_parallel_residual", True) else PreNorm(),
        bias=True,
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    own = m.positions if isinstance(m.positions, RoPE) else RoPE()
    return {
        **of_sizes(m),
        **of_rope(m.positions, fraction=0.25),
        "rotary_emb_base": own.theta,
        "rotary_pct": own.fraction,
        "layer_norm_eps": m.norm.eps,
        "attention_bias": attention_bias(m),
        "hidden_act": of_activation(m.mlp, DENSE),
        "use_parallel_residual": m.residual == Parallel(),
    }


UNUSED = ("head_dim", "num_key_value_heads", "rope_theta", "partial_rotary_factor")
"""Fields of other families, which this one calls otherwise or lacks."""
IGNORED = r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
COPIES = {"embed_out.weight": "gpt_neox.embed_in.weight"}
FAMILY = Family(
    "gpt_neox", "GPTNeoXForCausalLM", read, write, TABLE, prefix="gpt_neox.", ignored=IGNORED, copies=COPIES
)
