"""Granite 3 (arXiv:2408.13359): Llama with constant multipliers, as in muP, of embeddings, attention scores, residual
updates and logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gptjax.interop.families import llama
from gptjax.interop.families.family import Family, Fields
from gptjax.interop.families.fields import attentions
from gptjax.nn import PreNorm, ScaledPreNorm, TransformerConfig
from gptjax.types import UserError


def read(c: Fields) -> TransformerConfig:
    multiplier, divisor = c.or_default("residual_multiplier", 1.0), c.or_default("logits_scaling", 1.0)
    if not divisor:
        raise UserError("config.json: logits_scaling: got 0, which divides the logits; must be another number")
    m = llama.read(c)
    return dataclasses.replace(
        m,
        attention=dataclasses.replace(m.attention, scale=c.or_default("attention_multiplier", 1.0)),
        residual=PreNorm() if multiplier == 1 else ScaledPreNorm(multiplier),
        embedding_scale=c.or_default("embedding_multiplier", 1.0),
        logit_scale=1 / divisor,
    )


def write(m: TransformerConfig) -> dict[str, Any]:
    return {
        **llama.write(m),
        "residual_multiplier": m.residual.multiplier if isinstance(m.residual, ScaledPreNorm) else 1.0,
        "attention_multiplier": attentions(m)[0].scale,
        "embedding_multiplier": m.embedding_scale,
        "logits_scaling": _reciprocal(m.logit_scale / m.width_multiplier),
    }


def _reciprocal(x: float) -> float:
    """The number y with 1 / y == x in floating point if there is one near 1 / x, an integer if possible."""
    y = 1 / x if x else math.inf
    near = (float(round(y)) if math.isfinite(y) else y, y, math.nextafter(y, 0), math.nextafter(y, math.inf))
    return next((candidate for candidate in near if candidate and 1 / candidate == x), y)


FAMILY = Family("granite", "GraniteForCausalLM", read, write, llama.TABLE, classifier=None)
