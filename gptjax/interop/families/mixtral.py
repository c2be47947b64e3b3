"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama, mistral
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import GATED, activation, experts, of_activation
from gptjax.nn import MixtureOfExperts, TransformerConfig

EXPERTS = (
    Row("model.layers.{L}.block_sparse_moe.gate.weight", "E D", "blocks/{L}/mlp/router_logits", "D E"),
    Row("model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight", "F D", "blocks/{L}/mlp/gate", "E D F"),
    Row("model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight", "F D", "blocks/{L}/mlp/up", "E D F"),
    Row("model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight", "D F", "blocks/{L}/mlp/down", "E F D"),
)


def read(c: Fields) -> TransformerConfig:
    expert = activation(c, "hidden_act", GATED)
    mlp = MixtureOfExperts(c["num_local_experts"], c["num_experts_per_tok"], expert)
    return dataclasses.replace(mistral.read(Fields({"rope_theta": 1e6, "sliding_window": None, **c})), mlp=mlp)


def write(m: TransformerConfig) -> dict[str, Any]:
    moe = experts(m)
    return {
        **mistral.write(dataclasses.replace(m, mlp=moe.expert)),
        "hidden_act": of_activation(moe.expert, GATED),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
    }


TABLE = (*llama.ENDS, *llama.ATTENTION, *llama.NORMS, *EXPERTS)
ALIASES = {"num_experts": "num_local_experts"}
FAMILY = Family("mixtral", "MixtralForCausalLM", read, write, TABLE, aliases=ALIASES)
