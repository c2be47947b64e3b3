"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import DENSE, activation, of_activation
from gptjax.nn import LayerNorm, LearnedPositions, TransformerConfig

TABLE = (  # linear layers are [in, out], unlike those of other families
    Row("transformer.wte.weight", "V D", "embedding", "V D"),
    Row("transformer.wpe.weight", "T D", "positions/table", "T D"),
    Row("transformer.h.{L}.ln_1.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("transformer.h.{L}.ln_1.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("transformer.h.{L}.attn.c_attn.weight", "D ([N]+N+N H)", "blocks/{L}/attention/q", "D N H"),
    Row("transformer.h.{L}.attn.c_attn.weight", "D (N+[N]+N H)", "blocks/{L}/attention/k", "D N H"),
    Row("transformer.h.{L}.attn.c_attn.weight", "D (N+N+[N] H)", "blocks/{L}/attention/v", "D N H"),
    Row("transformer.h.{L}.attn.c_attn.bias", "([N]+N+N H)", "blocks/{L}/attention/q_bias", "N H"),
    Row("transformer.h.{L}.attn.c_attn.bias", "(N+[N]+N H)", "blocks/{L}/attention/k_bias", "N H"),
    Row("transformer.h.{L}.attn.c_attn.bias", "(N+N+[N] H)", "blocks/{L}/attention/v_bias", "N H"),
    Row("transformer.h.{L}.attn.c_proj.weight", "(N H) D", "blocks/{L}/attention/o", "N H D"),
    Row("transformer.h.{L}.attn.c_proj.bias", "D", "blocks/{L}/attention/o_bias", "D"),
    Row("transformer.h.{L}.ln_2.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("transformer.h.{L}.ln_2.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("transformer.h.{L}.mlp.c_fc.weight", "D F", "blocks/{L}/mlp/up", "D F"),
    Row("transformer.h.{L}.mlp.c_fc.bias", "F", "blocks/{L}/mlp/up_bias", "F"),
    Row("transformer.h.{L}.mlp.c_proj.weight", "F D", "blocks/{L}/mlp/down", "F D"),
    Row("transformer.h.{L}.mlp.c_proj.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
    Row("transformer.ln_f.weight", "D", "norm/scale", "D"),
    Row("transformer.ln_f.bias", "D", "norm/bias", "D"),
    Row("lm_head.weight", "V D", "head", "D V"),
    Row("score.weight", "Y D", "classifier", "D Y"),
)


def read(c: Fields) -> TransformerConfig:
    c.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return TransformerConfig(
        vocab=c["vocab_size"],
        layers=c["n_layer"],
        width=c["n_embd"],
        heads=c["n_head"],
        hidden=c.get("n_inner") or 4 * c["n_embd"],
        positions=LearnedPositions(c["n_positions"]),
        norm=LayerNorm(c["layer_norm_epsilon"]),
        mlp=activation(c, "activation_function", DENSE),
        bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab,
        "n_layer": m.layers,
        "n_embd": m.width,
        "n_head": m.heads,
        "n_inner": m.F,
        "n_positions": m.positions.max_positions or 1,
        "layer_norm_epsilon": m.norm.eps,
        "activation_function": of_activation(m.mlp, DENSE),
        "tie_word_embeddings": m.tie_embeddings,
    }


IGNORED = r".*\.attn\.(masked_)?bias"
COPIES = {"lm_head.weight": "transformer.wte.weight"}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    read,
    write,
    TABLE,
    prefix="transformer.",
    ignored=IGNORED,
    copies=COPIES,
    aliases=ALIASES,
)
