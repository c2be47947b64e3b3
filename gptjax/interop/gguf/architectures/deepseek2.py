"""DeepSeek-V3 and R1: latent attention, whose key and value matrices llama.cpp multiplies into queries and outputs."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.gguf import rope
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, Row, expanded, shortest
from gptjax.interop.gguf.architectures import llama, qwen
from gptjax.types import UserError

LATENT = expanded(
    {
        **{f"self_attn.{name}_proj.weight": f"attn_{name}.weight" for name in ("q_a", "q_b", "q")},
        "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
        "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        **{f"mlp.shared_experts.{name}_proj.weight": f"ffn_{name}_shexp.weight" for name in ("gate", "up", "down")},
    },
    *llama.LAYER,
)
KV = "model.layers.{L}.self_attn.kv_b_proj.weight"
SPLIT = (
    Row(KV, "blk.{L}.attn_k_b.weight", "(N [H]+U) R", "N R H"),
    Row(KV, "blk.{L}.attn_v_b.weight", "(N H+[U]) R", "N U R"),
)
TABLE = (*llama.ENDS, *LATENT, *SPLIT, *llama.MLP, *llama.NORMS, *qwen.EXPERTS)
SIGMOID = 2
"""llama.cpp's number of the router's function."""
LITE = (26, 27)
"""Numbers of layers by which llama.cpp recognises models without a latent for queries."""
COUNTS = {
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.kv_lora_rank": "kv_lora_rank",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Key -> field of config.json."""


def write(c: Fields) -> Metadata:
    nope, turned, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    given = c["rope_parameters"]
    keys = {**llama.plain(c), "rope.dimension_count": turned}
    keys |= rope.write(given, settings=("mscale", "mscale_all_dim"))
    if given["rope_type"] == "yarn":
        if not given.get("mscale") or given["mscale"] != given.get("mscale_all_dim"):
            pair = f"mscale {given.get('mscale')} and mscale_all_dim {given.get('mscale_all_dim')}"
            raise UserError(f"rope_scaling: got {pair}, must be equal for a GGUF file of architecture deepseek2")
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * given["mscale"]
    rank, layers = c.get("q_lora_rank"), c["num_hidden_layers"]
    if (rank is None) != (layers in LITE):
        counts = " or ".join(map(str, LITE))
        raise UserError(f"q_lora_rank: got {rank} with {layers} layers; GGUF has none with {counts} layers only")
    if rank is not None:
        keys["attention.q_lora_rank"] = rank
    return {
        **keys,
        **{key: c[field] for key, field in COUNTS.items()},
        "attention.head_count_kv": 1,  # keys and values of all heads are the latents
        "attention.key_length": c["kv_lora_rank"] + turned,
        "attention.value_length": c["kv_lora_rank"],
        "attention.key_length_mla": nope + turned,
        "attention.value_length_mla": value,
        "expert_shared_count": c["n_shared_experts"],
        "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_weights_norm": c["norm_topk_prob"],
        "expert_gating_func": SIGMOID,
        "expert_group_count": c["n_group"],
        "expert_group_used_count": c["topk_group"],
    }


def read(keys: Keys) -> dict[str, Any]:
    fields: dict[str, Any] = {field: keys.integer(key) for key, field in {**llama.SIZES, **COUNTS}.items()}
    keys.only("expert_gating_func", SIGMOID)
    if "expert_gating_func" not in keys:
        raise UserError("deepseek2.expert_gating_func: got none, must be 2 (DeepSeek-V3): gptjax has no DeepSeek-V2")
    turned = keys.integer("rope.dimension_count")
    for key, size in (("key", fields["kv_lora_rank"] + turned), ("value", fields["kv_lora_rank"])):
        keys.only(f"attention.{key}_length", size)
    keys.only("attention.head_count_kv", 1)
    keys.only("rope.scaling.attn_factor", 1.0)
    given = rope.read(keys, turned)
    if given["rope_type"] == "yarn":
        factor = shortest(keys.number("rope.scaling.yarn_log_multiplier") / 0.1)
        given |= {"mscale": factor, "mscale_all_dim": factor}
    return {
        **fields,
        "model_type": "deepseek_v3",
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length", 2_048),
        "tie_word_embeddings": not keys.has_tensor("output.weight"),
        "hidden_act": "silu",
        "num_key_value_heads": fields["num_attention_heads"],
        "head_dim": turned,
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys.integer("attention.key_length_mla") - turned,
        "v_head_dim": keys.integer("attention.value_length_mla"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "n_group": keys.integer("expert_group_count", 1),
        "topk_group": keys.integer("expert_group_used_count", 1),
        "rope_parameters": given,
        "rope_interleave": True,
    }


def sizes(c: Fields) -> dict[str, int]:
    return {"N": c["num_attention_heads"], "H": c["qk_nope_head_dim"], "U": c["v_head_dim"]}


ARCHITECTURE = Architecture("deepseek2", ("deepseek_v3",), TABLE, write, read, sizes)
