"""Rotary positions in config.json: "rope_parameters", or "rope_theta" and "rope_scaling" in older files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptjax.interop.families.family import Fields
from gptjax.nn import LinearScaling, Llama3Scaling, LongRoPE, Positions, RoPE, Scaling, YaRN
from gptjax.types import UserError

SCALINGS: dict[str, tuple[type[Scaling], dict[str, str]]] = {
    "default": (Scaling, {}),
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_freq_factor": "low",
            "high_freq_factor": "high",
            "original_max_position_embeddings": "original",
        },
    ),
    "yarn": (
        YaRN,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "truncate",
        },
    ),
    "longrope": (
        LongRoPE,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original",
            "short_factor": "short",
            "long_factor": "long",
            "attention_factor": "attention_factor",
        },
    ),
}
"""rope_type -> (our class, {their field: our field})."""
ALIASES = {"su": "longrope"}


def rope(c: Fields, given: Mapping[str, Any] | None = None, theta: float = 10_000.0, fraction: float = 1.0) -> RoPE:
    """The rotary encoding of a config.json.

    given            fields of one of several encodings. None: those of config.json
    theta, fraction  defaults

    LongRoPE uses its short factors, those of texts within the original length; `TransformerConfig.for_context_length`
    selects the long ones."""
    own = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})} if given is None else given
    kind = own.get("rope_type", own.get("type", "default"))
    kind = ALIASES.get(kind, kind)
    if kind not in SCALINGS:
        raise UserError(f"config.json: rope_scaling: got {kind!r}, must be one of {', '.join(SCALINGS)}")
    cls, names = SCALINGS[kind]
    values = {**own, **{name: c[name] for name in ("original_max_position_embeddings",) if name in c}}
    if "original_max_position_embeddings" in names:
        values.setdefault("original_max_position_embeddings", c.get("max_position_embeddings"))
        values.setdefault("factor", c.get("max_position_embeddings", 1) / values["original_max_position_embeddings"])
    fields = {ours: _tuple(values[name]) for name, ours in names.items() if values.get(name) is not None}
    if cls is LongRoPE:
        fields["length"] = fields["original"]
    return RoPE(
        theta=own.get("rope_theta", c.get("rope_theta", theta)),
        scaling=cls(**fields),
        fraction=own.get("partial_rotary_factor", c.get("partial_rotary_factor", fraction)),
    )


def of_rope(positions: Positions | None, fraction: float = 1.0) -> dict[str, Any]:
    """The fields of config.json, for old and new versions of `transformers`: the inverse of `rope`."""
    if not isinstance(positions, RoPE):
        return {}
    for kind, (cls, names) in SCALINGS.items():
        if type(positions.scaling) is cls:
            values = {name: getattr(positions.scaling, ours) for name, ours in names.items()}
            scaling = {"rope_type": kind, **{name: value for name, value in values.items() if value is not None}}
            top = {"rope_theta": positions.theta}
            if positions.fraction != fraction:
                top["partial_rotary_factor"] = positions.fraction
            original = values.get("original_max_position_embeddings")
            lengths = {} if original is None else {"original_max_position_embeddings": original}
            if isinstance(positions.scaling, LongRoPE):  # `transformers` computes its factor from these two lengths
                lengths["max_position_embeddings"] = round(positions.scaling.original * positions.scaling.factor)
            return {
                **top,
                **lengths,
                **({} if kind == "default" else {"rope_scaling": {**top, **scaling}}),
                "rope_parameters": {**top, **scaling},
            }
    return {}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
