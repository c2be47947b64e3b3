"""Mistral (arXiv:2310.06825): Llama with an optional sliding window in every layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import window
from gptjax.nn import MultiHeadAttention, TransformerConfig


def read(c: Fields) -> TransformerConfig:
    return dataclasses.replace(llama.plain(c), attention=MultiHeadAttention(window=c.get("sliding_window", 4_096)))


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**llama.of_plain(m), "sliding_window": window(m)}


FAMILY = Family("mistral", "MistralForCausalLM", read, write, llama.TABLE)
