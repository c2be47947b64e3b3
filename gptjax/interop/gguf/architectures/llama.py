"""Llama 2 and 3, Mistral and Mixtral. Their rotary embedding rotates neighbouring channels, like Meta's checkpoints;
Hugging Face's rotates the halves of a head. So the rows of queries and keys are permuted. Others extend this one."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.gguf import rope
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, Row, expanded

SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Key -> field of config.json."""
ENDS = tuple(
    expanded({
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    })
)  # fmt: skip
LAYER = ("model.layers.{L}.", "blk.{L}.")
PROJECTIONS = {
    f"self_attn.{theirs}_proj.{end}": f"{name}.{end}"
    for theirs, name in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.items()
    for end in ("weight", "bias")
}
ATTENTION = tuple(expanded(PROJECTIONS, *LAYER))
PERMUTED = tuple(
    Row(row.theirs, row.name, f"({heads} T J){axes}", f"({heads} J T){axes}")
    for row in ATTENTION
    for heads, name in {"N": "attn_q.", "K": "attn_k."}.items()
    for axes in (" D" if row.name.endswith("weight") else "",)
    if name in row.name
)
MLP = tuple(
    expanded(
        {
            f"mlp.{name}_proj.{end}": f"ffn_{name}.{end}"
            for name in ("gate", "up", "down")
            for end in ("weight", "bias")
        },
        *LAYER,
    )
)
NORMS = tuple(
    expanded(
        {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}, *LAYER
    )
)
EXPERTS = tuple(
    expanded(
        {
            "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
            "block_sparse_moe.experts.{E}.w1.weight": "ffn_gate_exps.weight",
            "block_sparse_moe.experts.{E}.w3.weight": "ffn_up_exps.weight",
            "block_sparse_moe.experts.{E}.w2.weight": "ffn_down_exps.weight",
        },
        *LAYER,
    )
)


def plain(c: Fields) -> Metadata:
    """The keys of sizes and norms, which many architectures share."""
    return {
        "context_length": c["max_position_embeddings"],
        **{key: c[field] for key, field in SIZES.items()},
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "vocab_size": c["vocab_size"],
    }


def of_plain(keys: Keys) -> dict[str, Any]:
    """The fields of config.json: the inverse of `plain`."""
    fields: dict[str, Any] = {field: keys.integer(key) for key, field in SIZES.items()}
    heads = max(fields["num_attention_heads"], 1)
    size = keys.integer("attention.key_length", fields["hidden_size"] // heads)
    keys.only("attention.value_length", size)
    return {
        **fields,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": size,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length", 2_048),
        "tie_word_embeddings": not keys.has_tensor("output.weight"),
        "hidden_act": "silu",
    }


def rotary(c: Fields) -> Metadata:
    """The keys of sizes, norms and rotary positions."""
    turned = rope.rotated(c, c["head_dim"])
    return {**plain(c), "rope.dimension_count": turned, **rope.write(c["rope_parameters"])}


def of_rotary(keys: Keys) -> dict[str, Any]:
    """The fields of config.json: the inverse of `rotary`."""
    fields = of_plain(keys)
    keys.only("rope.scaling.attn_factor", 1.0)
    return {**fields, "rope_parameters": rope.read(keys, fields["head_dim"])}


def write(c: Fields) -> Metadata:
    keys = {**plain(c), "rope.dimension_count": rope.rotated(c, c["head_dim"])}
    keys |= rope.write(c["rope_parameters"], "llama3", "longrope")
    if c["model_type"] == "mixtral":
        keys |= {"expert_count": c["num_local_experts"], "expert_used_count": c["num_experts_per_tok"]}
    return keys


def read(keys: Keys) -> dict[str, Any]:
    fields = of_rotary(keys)
    fields["rope_parameters"] = rope.read_frequencies(
        keys, fields["rope_parameters"], fields["max_position_embeddings"]
    )
    if experts := keys.integer("expert_count", 0):
        used = keys.integer("expert_used_count")
        moe = {"num_local_experts": experts, "num_experts_per_tok": used, "sliding_window": None}
        return {**fields, "model_type": "mixtral", **moe}
    keys.only("expert_used_count", 0)
    biased = (keys.has_tensor("blk.0.attn_q.bias"), keys.has_tensor("blk.0.ffn_up.bias"))
    return {**fields, "model_type": "llama", **dict(zip(("attention_bias", "mlp_bias"), biased, strict=True))}


def sizes(c: Fields) -> dict[str, int]:
    return {"N": c["num_attention_heads"], "K": c["num_key_value_heads"], "T": 2, "J": c["head_dim"] // 2}


KEPT = tuple(row for row in ATTENTION if row.name not in {permuted.name for permuted in PERMUTED})
ARCHITECTURE = Architecture(
    "llama",
    ("llama", "mistral", "mixtral"),
    (*ENDS, *PERMUTED, *KEPT, *MLP, *NORMS, *EXPERTS),
    write,
    read,
    sizes,
    rope.frequencies,
)
