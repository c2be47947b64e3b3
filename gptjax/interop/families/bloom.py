"""BLOOM (arXiv:2211.05100): ALiBi, a layer norm after the embedding, and biases."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.nn import GELU, ALiBi, LayerNorm, TransformerConfig

TABLE = (  # each head's queries, keys and values are contiguous
    Row("transformer.word_embeddings.weight", "V D", "embedding", "V D"),
    Row("transformer.word_embeddings_layernorm.weight", "D", "embedding_norm/scale", "D"),
    Row("transformer.word_embeddings_layernorm.bias", "D", "embedding_norm/bias", "D"),
    Row("transformer.h.{L}.input_layernorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("transformer.h.{L}.input_layernorm.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("transformer.h.{L}.post_attention_layernorm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("transformer.h.{L}.post_attention_layernorm.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("transformer.h.{L}.self_attention.query_key_value.weight", "(N [H]+H+H) D", "blocks/{L}/attention/q", "D N H"),
    Row("transformer.h.{L}.self_attention.query_key_value.weight", "(N H+[H]+H) D", "blocks/{L}/attention/k", "D N H"),
    Row("transformer.h.{L}.self_attention.query_key_value.weight", "(N H+H+[H]) D", "blocks/{L}/attention/v", "D N H"),
    Row("transformer.h.{L}.self_attention.query_key_value.bias", "(N [H]+H+H)", "blocks/{L}/attention/q_bias", "N H"),
    Row("transformer.h.{L}.self_attention.query_key_value.bias", "(N H+[H]+H)", "blocks/{L}/attention/k_bias", "N H"),
    Row("transformer.h.{L}.self_attention.query_key_value.bias", "(N H+H+[H])", "blocks/{L}/attention/v_bias", "N H"),
    Row("transformer.h.{L}.self_attention.dense.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("transformer.h.{L}.self_attention.dense.bias", "D", "blocks/{L}/attention/o_bias", "D"),
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
    c.only(apply_residual_connection_post_layernorm=False)
    norm = LayerNorm(c["layer_norm_epsilon"])
    return TransformerConfig(
        vocab=c["vocab_size"],
        layers=c["n_layer"],
        width=c["hidden_size"],
        heads=c["n_head"],
        hidden=4 * c["hidden_size"],
        positions=ALiBi(),
        norm=norm,
        mlp=GELU(),
        bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True),
        embedding_norm=norm,
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab,
        "n_layer": m.layers,
        "hidden_size": m.width,
        "n_head": m.heads,
        "layer_norm_epsilon": m.norm.eps,
        "tie_word_embeddings": m.tie_embeddings,
    }


COPIES = {"lm_head.weight": "transformer.word_embeddings.weight"}
ALIASES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "n_embed": "hidden_size"}
FAMILY = Family("bloom", "BloomForCausalLM", read, write, TABLE, prefix="transformer.", copies=COPIES, aliases=ALIASES)
