"""Falcon (arXiv:2311.16867): attention and MLP in parallel, multi-query or grouped-query attention, rotary positions.

Those with ALiBi (falcon-rw) are refused: `transformers` rounds its biases to bfloat16, position by position, so that
they are no longer functions of the distance."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import DENSE, activation, of_activation
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import LayerNorm, Parallel, TransformerConfig
from gptjax.types import UserError

QKV = "transformer.h.{L}.self_attention.query_key_value"
SECOND = "blocks/{L}/norm_2/scale"
TABLE = (  # each group's G queries are followed by their key and their value
    Row("transformer.word_embeddings.weight", "V D", "embedding", "V D"),
    Row(f"{QKV}.weight", "(K G+[1]+1 H) D", "blocks/{L}/attention/k", "D K H"),
    Row(f"{QKV}.weight", "(K G+1+[1] H) D", "blocks/{L}/attention/v", "D K H"),
    Row(f"{QKV}.weight", "(K [G]+1+1 H) D", "blocks/{L}/attention/q", "D (K G) H"),
    Row(f"{QKV}.bias", "(K G+[1]+1 H)", "blocks/{L}/attention/k_bias", "K H"),
    Row(f"{QKV}.bias", "(K G+1+[1] H)", "blocks/{L}/attention/v_bias", "K H"),
    Row(f"{QKV}.bias", "(K [G]+1+1 H)", "blocks/{L}/attention/q_bias", "(K G) H"),
    Row("transformer.h.{L}.self_attention.dense.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("transformer.h.{L}.self_attention.dense.bias", "D", "blocks/{L}/attention/o_bias", "D"),
    Row("transformer.h.{L}.input_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D", if_absent=SECOND),
    Row("transformer.h.{L}.input_layernorm.bias", "D", "blocks/{L}/norm_1/bias", "D", if_absent=SECOND),
    Row("transformer.h.{L}.ln_attn.weight", "D", "blocks/{L}/norm_1/scale", "D", if_present=SECOND),
    Row("transformer.h.{L}.ln_attn.bias", "D", "blocks/{L}/norm_1/bias", "D", if_present=SECOND),
    Row("transformer.h.{L}.ln_mlp.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("transformer.h.{L}.ln_mlp.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("transformer.h.{L}.mlp.dense_h_to_4h.weight", "F D", "blocks/{L}/mlp/up", "D F"),
    Row("transformer.h.{L}.mlp.dense_h_to_4h.bias", "F", "blocks/{L}/mlp/up_bias", "F"),
    Row("transformer.h.{L}.mlp.dense_4h_to_h.weight", "D F", "blocks/{L}/mlp/down", "F D"),
    Row("transformer.h.{L}.mlp.dense_4h_to_h.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
    Row("transformer.ln_f.weight", "D", "norm/scale", "D"),
    Row("transformer.ln_f.bias", "D", "norm/bias", "D"),
    Row("lm_head.weight", "V D", "head", "D V"),
    Row("score.weight", "Y D", "classifier", "D Y"),
)


def read(c: Fields) -> TransformerConfig:
    c = Fields({"activation": "gelu", **c})
    c.only(alibi=False)
    if not (parallel := c.get("parallel_attn", True)):
        raise UserError(f"config.json: parallel_attn: got {parallel}, must be True, the only supported value")
    heads, new = c["num_attention_heads"], bool(c.get("new_decoder_architecture"))
    norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if norms not in (1, 2) or norms > 1 + new:
        raise UserError(f"config.json: num_ln_in_parallel_attn: got {norms}, must be 1{' or 2' if new else ''}")
    return TransformerConfig(
        vocab=c["vocab_size"],
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=heads,
        kv_heads=_kv_heads(c, heads, new),
        hidden=c.get("ffn_hidden_size") or 4 * c["hidden_size"],
        positions=rope(c),
        norm=LayerNorm(c["layer_norm_epsilon"]),
        mlp=activation(c, "activation", DENSE),
        residual=Parallel(shared=norms == 1),
        bias=bool(c.get("bias")),
        tie_embeddings=c.get("tie_word_embeddings", True),
    )


def _kv_heads(c: Fields, heads: int, new: bool) -> int:
    given = c.get("num_kv_heads") or heads
    if new:
        return given
    if c.get("multi_query", True):
        return 1
    if given != heads:
        raise UserError(f"config.json: num_kv_heads: got {given}, must be {heads} without new_decoder_architecture")
    return heads


def write(m: TransformerConfig) -> dict[str, Any]:
    shared = m.residual == Parallel(shared=True)
    new = not shared or 1 < m.K < m.heads
    return {
        **of_rope(m.positions),
        "vocab_size": m.vocab,
        "num_hidden_layers": m.layers,
        "hidden_size": m.width,
        "num_attention_heads": m.heads,
        "new_decoder_architecture": new,
        "num_kv_heads": m.K if new else m.heads,
        "num_ln_in_parallel_attn": 1 if shared else 2,
        "multi_query": m.K == 1,
        "ffn_hidden_size": m.F,
        "layer_norm_epsilon": m.norm.eps,
        "activation": of_activation(m.mlp, DENSE),
        "alibi": False,
        "parallel_attn": True,
        "bias": m.bias,
        "tie_word_embeddings": m.tie_embeddings,
    }


COPIES = {"lm_head.weight": "transformer.word_embeddings.weight"}
ALIASES = {"n_embed": "hidden_size"}
FAMILY = Family(
    "falcon", "FalconForCausalLM", read, write, TABLE, prefix="transformer.", copies=COPIES, aliases=ALIASES
)
