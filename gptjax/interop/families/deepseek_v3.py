"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, and mixtures of experts after leading dense layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama, qwen3_moe
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, experts, of_activation, of_sizes, sizes
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import (
    LayerOverrides,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    RMSNorm,
    RoPE,
    Sigmoid,
    TransformerConfig,
    YaRN,
)
from gptjax.nn.positions.scaling import mscale

LATENT = "blocks/{L}/attention/q_latent"
TABLE = (  # M = H + P; Q and R: latent sizes; U: value size; S: hidden size of all shared experts together
    *(*llama.ENDS, *llama.MLP, *llama.NORMS, *qwen3_moe.EXPERTS),
    Row("model.layers.{L}.self_attn.q_a_proj.weight", "Q D", "blocks/{L}/attention/q_latent", "D Q"),
    Row("model.layers.{L}.self_attn.q_a_layernorm.weight", "Q", "blocks/{L}/attention/q_norm_scale", "Q"),
    Row("model.layers.{L}.self_attn.q_b_proj.weight", "(N M) Q", "blocks/{L}/attention/q", "Q N M", if_present=LATENT),
    Row("model.layers.{L}.self_attn.q_proj.weight", "(N M) D", "blocks/{L}/attention/q", "D N M", if_absent=LATENT),
    Row("model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight", "([R]+P) D", "blocks/{L}/attention/kv_latent", "D R"),
    Row("model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight", "(R+[P]) D", "blocks/{L}/attention/k_rope", "D P"),
    Row("model.layers.{L}.self_attn.kv_a_layernorm.weight", "R", "blocks/{L}/attention/kv_norm_scale", "R"),
    Row("model.layers.{L}.self_attn.kv_b_proj.weight", "(N [H]+U) R", "blocks/{L}/attention/k", "R N H"),
    Row("model.layers.{L}.self_attn.kv_b_proj.weight", "(N H+[U]) R", "blocks/{L}/attention/v", "R N U"),
    Row("model.layers.{L}.self_attn.o_proj.weight", "D (N U)", "blocks/{L}/attention/o", "N U D"),
    Row("model.layers.{L}.mlp.gate.e_score_correction_bias", "E", "blocks/{L}/mlp/router_balance", "E"),
    Row("model.layers.{L}.mlp.shared_experts.gate_proj.weight", "S D", "blocks/{L}/mlp/shared_gate", "D S"),
    Row("model.layers.{L}.mlp.shared_experts.up_proj.weight", "S D", "blocks/{L}/mlp/shared_up", "D S"),
    Row("model.layers.{L}.mlp.shared_experts.down_proj.weight", "D S", "blocks/{L}/mlp/shared_down", "S D"),
)


def read(c: Fields) -> TransformerConfig:
    c.only(attention_bias=False, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    dense = activation(c, "hidden_act", GATED)
    positions = dataclasses.replace(rope(c), interleaved=c.get("rope_interleave", True))
    size = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    router = Sigmoid(
        renormalise=c.get("norm_topk_prob", True),
        scale=c["routed_scaling_factor"],
        groups=c["n_group"],
        top_groups=c["topk_group"],
    )
    return TransformerConfig(
        **{
            **sizes(c),
            "kv_heads": None,
            "head_size": c["qk_nope_head_dim"],
            "hidden": c["moe_intermediate_size"],
        },
        positions=positions,
        norm=RMSNorm(c["rms_norm_eps"]),
        attention=MultiHeadLatentAttention(
            q_rank=c.get("q_lora_rank", 1_536),
            kv_rank=c["kv_lora_rank"],
            rope_size=c["qk_rope_head_dim"],
            value_size=c["v_head_dim"],
            scale=size**-0.5 * attention_factor(positions),
        ),
        mlp=MixtureOfExperts(
            c["n_routed_experts"], c["num_experts_per_tok"], dense, router, shared=c.get("n_shared_experts", 1) or 0
        ),
        leading_layers=(LayerOverrides(mlp=dense, hidden=c["intermediate_size"]),) * c["first_k_dense_replace"],
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    moe = experts(m)
    a = m.attention if isinstance(m.attention, MultiHeadLatentAttention) else MultiHeadLatentAttention()
    blocks = m.stack().blocks
    dense = [block for block in blocks if not isinstance(block.mlp, MixtureOfExperts)]
    return {
        **of_sizes(m),
        **of_rope(m.positions),
        "rope_interleave": isinstance(m.positions, RoPE) and m.positions.interleaved,
        "head_dim": a.rope_size,
        "rms_norm_eps": m.norm.eps,
        "hidden_act": of_activation(moe.expert, GATED),
        "intermediate_size": dense[0].hidden if dense else m.F,
        "moe_intermediate_size": blocks[-1].hidden,
        "first_k_dense_replace": len(dense),
        "q_lora_rank": a.q_rank,
        "kv_lora_rank": a.kv_rank,
        "qk_rope_head_dim": a.rope_size,
        "qk_nope_head_dim": m.H,
        "v_head_dim": a.value_size,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared or None,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.renormalise,
        "routed_scaling_factor": moe.router.scale,
        "n_group": moe.router.groups,
        "topk_group": moe.router.top_groups,
    }


def attention_factor(positions: RoPE) -> float:
    """YaRN's factor of the attention scores for a longer context."""
    scaling = positions.scaling
    if not isinstance(scaling, YaRN) or not scaling.mscale_all_dim:
        return 1.0
    return mscale(scaling.factor, scaling.mscale_all_dim) ** 2


IGNORED = r".*\.rotary_emb\.inv_freq|model\.layers\.61\..*"  # layer 61 predicts a second token
ALIASES = {"num_local_experts": "n_routed_experts"}
FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", read, write, TABLE, ignored=IGNORED, aliases=ALIASES)
