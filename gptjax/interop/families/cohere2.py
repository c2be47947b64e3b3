"""Command R7B and Command A (arXiv:2504.00698): Command R with a sliding window in three of four layers, and without
position encoding in the others (NoPE)."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import cohere
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attention_kinds, layer_types, repeated, window
from gptjax.nn import LayerOverrides, Positions, TransformerConfig


def read(c: Fields) -> TransformerConfig:
    n, period = c["num_hidden_layers"], c.or_default("sliding_window_pattern", 4)
    kinds = attention_kinds(c, [LOCAL if (i + 1) % period else GLOBAL for i in range(n)])
    local = LayerOverrides(window=c.or_default("sliding_window", 4_096)) if LOCAL in kinds else LayerOverrides()
    variants = [local if kind == LOCAL else LayerOverrides(positions=Positions()) for kind in kinds]
    return dataclasses.replace(cohere.plain(c), **repeated(variants))


def write(m: TransformerConfig) -> dict[str, Any]:
    return {**cohere.of_plain(m), "layer_types": layer_types(m), "sliding_window": window(m) or 4_096}


FAMILY = Family("cohere2", "Cohere2ForCausalLM", read, write, cohere.TABLE, classifier=None)
