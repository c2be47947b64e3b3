"""nanochat (github.com/karpathy/nanochat) as first published: norms without parameters, one of them after the
embedding, QK-norm, ReLU^2 and a soft-capped head.

The class of `transformers` lacks what came later: windows, value embeddings, scalars of the residual stream, smearing,
subtraction of the middle layer, and another scale of the scores."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import DENSE, activation, attention_bias, of_activation, of_sizes, sizes
from gptjax.interop.families.rope import of_rope, rope
from gptjax.nn import MultiHeadAttention, RMSNorm, TransformerConfig
from gptjax.types import UserError

MLP = (
    Row("model.layers.{L}.mlp.fc1.weight", "F D", "blocks/{L}/mlp/up", "D F"),
    Row("model.layers.{L}.mlp.fc2.weight", "D F", "blocks/{L}/mlp/down", "F D"),
)


def read(c: Fields) -> TransformerConfig:
    c = Fields({"final_logit_softcapping": 15.0, **c})
    norm, positions = RMSNorm(c["rms_norm_eps"], scale=False), rope(c)
    if positions.scaling.amplitude != 1:
        raise UserError(
            f"config.json: rope_parameters: got an attention_factor of {positions.scaling.amplitude}, must be 1 in "
            "nanochat, which normalises after the rotation"
        )
    return TransformerConfig(
        **sizes(c),
        positions=dataclasses.replace(positions, clockwise=True),
        norm=norm,
        attention=MultiHeadAttention(bias=c.get("attention_bias", False), qk_norm=norm),
        mlp=activation(c, "hidden_act", DENSE),
        embedding_norm=norm,
        logit_softcap=c.get("final_logit_softcapping"),
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {
        **of_sizes(m),
        **of_rope(m.positions),
        "rms_norm_eps": m.norm.eps,
        "attention_bias": attention_bias(m),
        "hidden_act": of_activation(m.mlp, DENSE),
        "final_logit_softcapping": m.logit_softcap,
    }


TABLE = (*llama.ENDS, *llama.ATTENTION, *MLP)
FAMILY = Family("nanochat", "NanoChatForCausalLM", read, write, TABLE, classifier=None)
