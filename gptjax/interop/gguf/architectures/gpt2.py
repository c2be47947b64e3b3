"""GPT-2. Hugging Face's linear layers are [in, out]."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, Row, expanded

NORMS = {"h.{L}.ln_1": "blk.{L}.attn_norm", "h.{L}.ln_2": "blk.{L}.ffn_norm", "ln_f": "output_norm"}
LINEAR = {
    "h.{L}.attn.c_attn": "blk.{L}.attn_qkv",
    "h.{L}.attn.c_proj": "blk.{L}.attn_output",
    "h.{L}.mlp.c_fc": "blk.{L}.ffn_up",
    "h.{L}.mlp.c_proj": "blk.{L}.ffn_down",
}
ENDS = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
VECTORS = {f"{theirs}.{end}": f"{name}.{end}" for theirs, name in NORMS.items() for end in ("weight", "bias")}
VECTORS |= {f"{theirs}.bias": f"{name}.bias" for theirs, name in LINEAR.items()}
TABLE = (
    *expanded({**ENDS, **VECTORS}, "transformer."),
    *(Row(f"transformer.{theirs}.weight", f"{name}.weight", "A B", "B A") for theirs, name in LINEAR.items()),
    Row("lm_head.weight", "output.weight"),
)
SIZES = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}
"""Key -> field of config.json."""


def write(c: Fields) -> Metadata:
    return {
        **{key: c[field] for key, field in SIZES.items()},
        "attention.head_count_kv": c["n_head"],
        "attention.layer_norm_epsilon": float(c["layer_norm_epsilon"]),
        "vocab_size": c["vocab_size"],
    }


def read(keys: Keys) -> dict[str, Any]:
    fields: dict[str, Any] = {field: keys.integer(key) for key, field in SIZES.items()}
    keys.only("attention.head_count_kv", fields["n_head"])
    size = fields["n_embd"] // max(fields["n_head"], 1)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        keys.only(key, size)
    return {
        **fields,
        "model_type": "gpt2",
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": not keys.has_tensor("output.weight"),
    }


ARCHITECTURE = Architecture("gpt2", ("gpt2",), TABLE, write, read)
