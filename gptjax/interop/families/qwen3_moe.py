"""Qwen 3 with mixtures of experts (arXiv:2505.09388) in some layers, usually in all."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama, qwen3
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, attention_bias, experts, repeated, window
from gptjax.nn import LayerOverrides, MixtureOfExperts, Softmax, TransformerConfig

EXPERTS = (
    Row("model.layers.{L}.mlp.gate.weight", "E D", "blocks/{L}/mlp/router_logits", "D E"),
    Row("model.layers.{L}.mlp.experts.{E}.gate_proj.weight", "F D", "blocks/{L}/mlp/gate", "E D F"),
    Row("model.layers.{L}.mlp.experts.{E}.up_proj.weight", "F D", "blocks/{L}/mlp/up", "E D F"),
    Row("model.layers.{L}.mlp.experts.{E}.down_proj.weight", "D F", "blocks/{L}/mlp/down", "E F D"),
)


def read(c: Fields) -> TransformerConfig:
    window = c.get("sliding_window", 4_096) if c.get("use_sliding_window", False) else None  # in all layers
    m = dataclasses.replace(llama.plain(c), attention=qwen3.attention(c, window))
    dense = LayerOverrides(mlp=m.mlp, hidden=c["intermediate_size"])
    router = Softmax(renormalise=c.get("norm_topk_prob", False))
    count, expert = c["num_experts"], activation(c, "hidden_act", GATED)
    moe = MixtureOfExperts(count, c["num_experts_per_tok"], expert, router)
    period, dense_layers = c.or_default("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    sparse = [i not in dense_layers and (i + 1) % period == 0 for i in range(c["num_hidden_layers"])]
    variants = [LayerOverrides() if moe_here else dense for moe_here in sparse]
    return dataclasses.replace(m, mlp=moe, hidden=c["moe_intermediate_size"], **repeated(variants))


def write(m: TransformerConfig) -> dict[str, Any]:
    moe = experts(m)
    blocks = m.stack().blocks
    dense = [i for i, block in enumerate(blocks) if not isinstance(block.mlp, MixtureOfExperts)]
    return {
        **llama.of_plain(dataclasses.replace(m, mlp=moe.expert)),
        "attention_bias": attention_bias(m),
        "use_sliding_window": window(m) is not None,
        "sliding_window": window(m),
        "intermediate_size": blocks[dense[0]].hidden if dense else m.F,
        "moe_intermediate_size": next((b.hidden for b in blocks if isinstance(b.mlp, MixtureOfExperts)), m.F),
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


TABLE = (*llama.TABLE, *qwen3.QK_NORMS, *EXPERTS)
ALIASES = {"num_local_experts": "num_experts"}
FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, TABLE, aliases=ALIASES)
