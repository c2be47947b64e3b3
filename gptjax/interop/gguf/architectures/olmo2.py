"""OLMo 2: norms after the sublayers, and QK-norm over all heads jointly."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, expanded
from gptjax.interop.gguf.architectures import llama, qwen
from gptjax.types import UserError

NORMS = expanded(
    {
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    },
    *llama.LAYER,
)
TABLE = (*llama.ENDS, *llama.ATTENTION, *llama.MLP, *qwen.QK_NORMS, *NORMS)


def write(c: Fields) -> Metadata:
    if c["tie_word_embeddings"]:
        raise UserError("tie_word_embeddings: got True, must be False for a GGUF file of architecture olmo2")
    return llama.rotary(c)


def read(keys: Keys) -> dict[str, Any]:
    return {**llama.of_rotary(keys), "model_type": "olmo2", "attention_bias": False}


ARCHITECTURE = Architecture("olmo2", ("olmo2",), TABLE, write, read)
