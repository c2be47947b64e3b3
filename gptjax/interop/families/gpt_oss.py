"""gpt-oss (arXiv:2508.10925): mixture of experts, attention sinks, a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import (
    GLOBAL,
    LOCAL,
    attention_bias,
    attention_kinds,
    experts,
    layer_types,
    of_sizes,
    repeated,
    sizes,
    window,
)
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import (
    ClampedSwiGLU,
    LayerOverrides,
    MixtureOfExperts,
    MultiHeadAttention,
    RMSNorm,
    Softmax,
    TransformerConfig,
)

TABLE = (  # gate and up alternate
    *(*llama.ENDS, *llama.ATTENTION, *llama.NORMS),
    Row("model.layers.{L}.self_attn.sinks", "N", "blocks/{L}/attention/sinks", "N"),
    Row("model.layers.{L}.mlp.router.weight", "E D", "blocks/{L}/mlp/router_logits", "D E"),
    Row("model.layers.{L}.mlp.router.bias", "E", "blocks/{L}/mlp/router_bias", "E"),
    Row("model.layers.{L}.mlp.experts.gate_up_proj", "E D (F [1]+1)", "blocks/{L}/mlp/gate", "E D F"),
    Row("model.layers.{L}.mlp.experts.gate_up_proj", "E D (F 1+[1])", "blocks/{L}/mlp/up", "E D F"),
    Row("model.layers.{L}.mlp.experts.gate_up_proj_bias", "E (F [1]+1)", "blocks/{L}/mlp/gate_bias", "E F"),
    Row("model.layers.{L}.mlp.experts.gate_up_proj_bias", "E (F 1+[1])", "blocks/{L}/mlp/up_bias", "E F"),
    Row("model.layers.{L}.mlp.experts.down_proj", "E F D", "blocks/{L}/mlp/down", "E F D"),
    Row("model.layers.{L}.mlp.experts.down_proj_bias", "E D", "blocks/{L}/mlp/down_bias", "E D"),
)
THETA = 150_000.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4_096,
}
"""Default of "rope_parameters"."""


def read(c: Fields) -> TransformerConfig:
    c.only(hidden_act="silu")
    if c.get("rope_parameters") is None:
        c = Fields({**c, "rope_parameters": {**YARN, "rope_theta": c.get("rope_theta", THETA)}})
    kinds = attention_kinds(c, [(LOCAL, GLOBAL)[i % 2] for i in range(c["num_hidden_layers"])])
    local = LayerOverrides(window=c["sliding_window"])
    return TransformerConfig(
        **sizes(Fields({"head_dim": 64, **c})),
        positions=rope(c, theta=THETA),
        norm=RMSNorm(c["rms_norm_eps"]),
        attention=MultiHeadAttention(bias=c.get("attention_bias", True), sinks=True),
        mlp=MixtureOfExperts(
            c["num_local_experts"],
            c["num_experts_per_tok"],
            ClampedSwiGLU(c.get("swiglu_limit", 7.0), c.get("swiglu_alpha", 1.702)),
            Softmax(bias=True),
        ),
        bias=True,
        **repeated([local if kind == LOCAL else LayerOverrides() for kind in kinds]),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    moe = experts(m)
    expert = moe.expert if isinstance(moe.expert, ClampedSwiGLU) else ClampedSwiGLU()
    return {
        **of_sizes(m),
        **of_rope(m.positions),
        "rms_norm_eps": m.norm.eps,
        "attention_bias": attention_bias(m),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_limit": expert.limit,
        "swiglu_alpha": expert.alpha,
        "layer_types": layer_types(m),
        "sliding_window": window(m) or 128,
    }


ALIASES = {"num_experts": "num_local_experts"}
FAMILY = Family("gpt_oss", "GptOssForCausalLM", read, write, TABLE, aliases=ALIASES)
