"""The supported model families. To add one, add a file here and its name to the list."""

from __future__ import annotations

from gptjax.interop.families import (
    bert,
    bloom,
    cohere,
    cohere2,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    modernbert,
    nanochat,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    smollm3,
    stablelm,
    starcoder2,
    t5,
    xlm_roberta,
)
from gptjax.interop.families.family import (
    ANSWERERS,
    ANSWERING,
    CLASSIFYING,
    TAGGING,
    Family,
    Fields,
    Piece,
    Row,
    pieces,
)

_MODULES = (gpt2, llama, mistral, qwen2, qwen3, gpt_neox, gemma, gemma2, gemma3, olmo2, olmo3, phi3, smollm3, nanochat)
_MORE = (granite, cohere, cohere2, stablelm, starcoder2, falcon, bloom)
_MIXTURES = (mixtral, qwen3_moe, gpt_oss, deepseek_v3)
_ENCODERS = (bert, roberta, xlm_roberta, modernbert)
FAMILIES = tuple(module.FAMILY for module in (*_MODULES, *_MORE, *_MIXTURES, *_ENCODERS, t5))
"""All families. If several can express a model, the first is used."""

__all__ = ["ANSWERERS", "ANSWERING", "CLASSIFYING", "FAMILIES", "TAGGING", "Family", "Fields", "Piece", "Row", "pieces"]
