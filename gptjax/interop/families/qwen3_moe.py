"""Qwen 3 with mixtures of experts (arXiv:2505.09388) in some layers, usually in all."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama, qwen2, qwen3
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, experts, repeated
from gptjax.nn import LayerOverrides, MixtureOfExperts, Softmax, TransformerConfig

EXPERTS = (
    Row("model.layers.{L}.mlp.gate.weight", "E D", "blocks/{L}/mlp/router_logits", "D E"),
    Row("model.layers.{L}.mlp.experts.{E}.gate_proj.weight", "F D", "blocks/{L}/mlp/gate", "E D F"),
    Row("model.layers.{L}.mlp.experts.{E}.up_proj.weight", "F D", "blocks/{L}/mlp/up", "E D F"),
    Row("model.layers.{L}.mlp.experts.{E}.down_proj.weight", "D F", "blocks/{L}/mlp/down", "E F D"),
)


def read(c: Fields) -> TransformerConfig:
    m = qwen3.read(c)
    dense = LayerOverrides(mlp=m.mlp, hidden=c["intermediate_size"])
    router = Softmax(renormalise=c.get("norm_topk_prob", False))
    count, expert = c.get("num_experts") or c["num_local_experts"], activation(c, "hidden_act", GATED)
    moe = MixtureOfExperts(count, c["num_experts_per_tok"], expert, router)
    period, dense_layers = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    variants = [
        dataclasses.replace(dense, window=layer.window) if i in dense_layers or (i + 1) % period else layer
        for i, layer in enumerate(qwen2.windows(c))
    ]
    return dataclasses.replace(m, mlp=moe, hidden=c["moe_intermediate_size"], **repeated(variants))


def write(m: TransformerConfig) -> dict[str, Any]:
    moe = experts(m)
    blocks = m.stack().blocks
    dense = [i for i, block in enumerate(blocks) if not isinstance(block.mlp, MixtureOfExperts)]
    return {
        **qwen3.write(dataclasses.replace(m, mlp=moe.expert)),
        "intermediate_size": blocks[dense[0]].hidden if dense else m.F,
        "moe_intermediate_size": next((b.hidden for b in blocks if isinstance(b.mlp, MixtureOfExperts)), m.F),
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


TABLE = (*llama.TABLE, *qwen3.QK_NORMS, *EXPERTS)
FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, TABLE)
