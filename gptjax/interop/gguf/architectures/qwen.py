"""Qwen 2 and 3, dense and with mixtures of experts."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, expanded
from gptjax.interop.gguf.architectures import llama

QK_NORMS = tuple(expanded({f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}, *llama.LAYER))
EXPERTS = tuple(
    expanded(
        {
            "mlp.gate.weight": "ffn_gate_inp.weight",
            **{f"mlp.experts.{{E}}.{x}_proj.weight": f"ffn_{x}_exps.weight" for x in ("gate", "up", "down")},
        },
        *llama.LAYER,
    )
)
DENSE = (*llama.ENDS, *llama.ATTENTION, *llama.MLP, *llama.NORMS)
SPARSE = (*llama.ENDS, *llama.ATTENTION, *llama.NORMS, *QK_NORMS, *EXPERTS)
WINDOWLESS = {"use_sliding_window": False, "sliding_window": None}


def read_2(keys: Keys) -> dict[str, Any]:
    return {**llama.of_rotary(keys), **WINDOWLESS, "model_type": "qwen2"}


def read_3(keys: Keys) -> dict[str, Any]:
    bias = keys.has_tensor("blk.0.attn_q.bias")
    return {**llama.of_rotary(keys), **WINDOWLESS, "attention_bias": bias, "model_type": "qwen3"}


def write_3_moe(c: Fields) -> Metadata:
    return {
        **llama.rotary(c),
        "expert_count": c["num_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
    }


def read_3_moe(keys: Keys) -> dict[str, Any]:
    """llama.cpp always divides the weights of the chosen experts by their sum, and has experts in every layer."""
    fields, used = read_3(keys), keys.integer("expert_used_count")
    hidden = fields["intermediate_size"] // max(used, 1)
    keys.only("expert_weights_scale", 0.0, 1.0)
    return {
        **fields,
        "model_type": "qwen3_moe",
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", hidden),
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


QWEN2 = Architecture("qwen2", ("qwen2",), DENSE, llama.rotary, read_2)
QWEN3 = Architecture("qwen3", ("qwen3",), (*DENSE, *QK_NORMS), llama.rotary, read_3)
QWEN3_MOE = Architecture("qwen3moe", ("qwen3_moe",), SPARSE, write_3_moe, read_3_moe)
