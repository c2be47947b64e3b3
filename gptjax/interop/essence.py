"""Canonical form of a model's configuration, to compare what trained models compute."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from gptjax.nn import (
    MLP,
    Attention,
    BackboneConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    HeadConfig,
    LayerOverrides,
    LongRoPE,
    MixtureOfExperts,
    ModelConfig,
    MultiHeadAttention,
    Parametrisation,
    RoPE,
    SequenceMixer,
    SwiGLU,
)
from gptjax.nn.config import OF_COMPUTATION


def essence(m: ModelConfig) -> dict[str, Any]:
    """Canonical form of everything that determines a trained model's output: each layer separately, with its sizes.
    Equivalent configurations have equal forms."""
    if isinstance(m, EncoderDecoderConfig):
        return {"encoder": essence(m.encoder), "decoder": essence(m.decoder)}
    if isinstance(m, HeadConfig):
        headless: dict[str, Any] = {"transform": None} if isinstance(m.backbone, EncoderConfig) else {}
        backbone = dataclasses.replace(m.backbone, tie_embeddings=True, **headless)
        names = [field.name for field in dataclasses.fields(m) if field.name != "backbone"]
        return {**essence(backbone), m.architecture: {name: getattr(m, name) for name in (*names, "width_multiplier")}}
    assert isinstance(m, BackboneConfig)
    layers = {
        str(i): {
            "attention": _attention(block.attention),
            "cross_attention": _attention(block.cross_attention),
            "mlp": _mlp(block.mlp),
            "hidden": block.hidden,
            "bias": block.bias,
            "residual": None if block.residual == m.residual else block.residual,
        }
        for i, block in enumerate(m.stack().blocks)
    }
    of_layers = {
        "kv_heads": None,
        "head_size": 2,
        "hidden": None,
        "bias": False,
        "leading_layers": (),
        "pattern": (LayerOverrides(),),
    }
    parts = {"attention": MultiHeadAttention(), "cross_attention": None, "mlp": SwiGLU()}
    positions = RoPE() if isinstance(m.positions, RoPE) else m.positions  # RoPE's settings are compared in the layers
    of_computation: Any = {f.name: f.default for f in dataclasses.fields(BackboneConfig) if f.name in OF_COMPUTATION}
    scales: Any = {"logit_scale": m.logit_scale / m.width_multiplier, "parametrisation": Parametrisation()}
    rest = dataclasses.replace(m, positions=positions, **of_layers, **parts, **of_computation, **scales)
    return {"model": rest, "layers": layers}


def summarise(changes: Iterable[str]) -> list[str]:
    """Differences of two canonical forms. One that several layers share is `layers.*.attention.bias: False → True`."""
    shared: dict[str, list[str]] = {}
    for change in changes:
        shared.setdefault(re.sub(r"\blayers\.\d+\.", "layers.*.", change), []).append(change)
    merged = [change if len(separate) > 1 else separate[0] for change, separate in shared.items()]
    whole = {change.removeprefix("model.") for change in merged if change.startswith("model.")}
    return [change for change in merged if change.removeprefix("layers.*.attention.") not in whole]


def _attention(part: SequenceMixer | None) -> SequenceMixer | None:
    if isinstance(part, MultiHeadAttention):
        if part.scale is None and part.head_size is not None:
            part = dataclasses.replace(part, scale=part.head_size**-0.5)
        output_bias = part.bias if part.output_bias is None else part.output_bias
        part = dataclasses.replace(part, output_bias=output_bias, implementation=None)
    positions = part.positions if isinstance(part, Attention) else None
    if isinstance(part, Attention) and isinstance(positions, RoPE) and isinstance(positions.scaling, LongRoPE):
        scaling = dataclasses.replace(positions.scaling, length=None)  # in `transformers` it is each text's length
        part = dataclasses.replace(part, positions=dataclasses.replace(positions, scaling=scaling))
    return part


def _mlp(part: MLP | None) -> MLP | None:
    if not isinstance(part, MixtureOfExperts):
        return part
    router = dataclasses.replace(part.router, load_balance=0.0, z_loss=0.0)
    return dataclasses.replace(part, router=router, capacity=None, implementation=None)
