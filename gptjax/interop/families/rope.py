"""Rotary positions in config.json: "rope_parameters", or "rope_theta" and "rope_scaling" in older files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.interop.families.family import Fields
from gptjax.interop.families.fields import GLOBAL, LOCAL, attentions, layer_types
from gptjax.nn import (
    BackboneConfig,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    Positions,
    RoPE,
    Scaling,
    YaRN,
)
from gptjax.types import Json, UserError

SCALINGS: dict[str, tuple[type[Scaling], dict[str, str]]] = {
    "default": (Scaling, {}),
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_freq_factor": "low",
            "high_freq_factor": "high",
            "original_max_position_embeddings": "original_length",
        },
    ),
    "yarn": (
        YaRN,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
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
            "original_max_position_embeddings": "original_length",
            "short_factor": "short",
            "long_factor": "long",
            "attention_factor": "attention_factor",
        },
    ),
}
"""rope_type -> (our class, {their field: our field})."""
ALIASES = {"su": "longrope"}


def rope(
    c: Fields, given: Mapping[str, Any] | None = None, theta: float = 10_000.0, fraction: float | None = None
) -> RoPE:
    """The rotary encoding of a config.json.

    given     fields of one of several encodings. None: those of config.json
    theta     default base
    fraction  default fraction of a head. None: the family rotates whole heads, and any other fraction is refused

    "rope_scaling" replaces "rope_parameters", as in `transformers`; its base and fraction are then those of config.json
    or the defaults. Raises UserError if "rope_parameters" has others, for an unknown type and for a missing number.

    LongRoPE uses its short factors, those of texts within the original length; `TransformerConfig.for_context_length`
    selects the long ones."""
    share = c.get("partial_rotary_factor")
    default = {"rope_theta": theta, "partial_rotary_factor": (fraction or 1.0) if share is None else share}
    if given is None:
        default["rope_theta"] = c.get("rope_theta", theta)
        given = _one_of(_mapping(c, "rope_scaling"), _mapping(c, "rope_parameters"), default)
        outer = c.get("original_max_position_embeddings")
    else:
        outer = None
    values = Fields({**default, **given})
    kind = _kind(given)
    cls, names = SCALINGS[kind]
    if "original_max_position_embeddings" in names:
        longest = c.get("max_position_embeddings")
        original = values["original_max_position_embeddings"] = (
            outer or given.get("original_max_position_embeddings") or longest
        )
        if kind != "llama3" and values.get("factor") is None and longest and original:
            values["factor"] = longest / original
    fields = {ours: _tuple(values[name]) for name, ours in names.items() if values.get(name) is not None}
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    needed = set(names.values()) if cls is Llama3Scaling else required
    if lacking := [name for name, ours in names.items() if ours in needed - fields.keys()]:
        raise UserError(f"config.json: rope_parameters: got none for {', '.join(lacking)}, which {kind!r} needs")
    if cls is LongRoPE:
        fields["length"] = fields["original_length"]
    if fraction is None:
        values.only(partial_rotary_factor=1.0)
    return RoPE(theta=values["rope_theta"], scaling=cls(**fields), fraction=values["partial_rotary_factor"])


def ropes(c: Fields, thetas: Mapping[str, Any]) -> dict[str, RoPE]:
    """The rotary encodings of a config.json that has one for `LOCAL` and one for `GLOBAL` layers. "rope_scaling" is
    that of global layers.

    thetas  default base of each
    """
    given, scaling = (c.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if unknown := given.keys() - {GLOBAL, LOCAL}:
        raise UserError(f"config.json: rope_parameters: got {', '.join(sorted(unknown))}, must be {GLOBAL} and {LOCAL}")
    own = {kind: given.get(kind) or {"rope_type": "default"} for kind in (GLOBAL, LOCAL)}
    own[GLOBAL] = {**own[GLOBAL], **scaling}
    return {kind: rope(c, fields, thetas[kind]) for kind, fields in own.items()}


def of_ropes(m: BackboneConfig) -> dict[str, Any]:
    """The field of config.json for the encodings of both kinds of layers: the inverse of `ropes`."""
    seen = dict(zip(layer_types(m), (attention.positions for attention in attentions(m)), strict=True))
    own = {kind: of_rope(seen.get(kind) or m.positions).get("rope_parameters") for kind in (GLOBAL, LOCAL)}
    return {"rope_parameters": own}


def _one_of(scaling: dict[str, Any], parameters: dict[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """ "rope_scaling" if there is one, else "rope_parameters"; see `rope`."""
    if not scaling:
        return parameters
    for name, value in {**default, **scaling}.items():
        if name in default and parameters.get(name, value) != value:
            raise UserError(
                f"config.json: rope_scaling: got {name} {value} beside rope_parameters with {parameters[name]}, must "
                "be the same; put the scaling into rope_parameters"
            )
    return scaling


def _mapping(c: Fields, name: str) -> dict[str, Any]:
    """The fields of the rotary encoding `name`; none if it is missing or null."""
    value = c.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"config.json: {name}: got {value!r}, must be an object")
    if nested := [key for key, inner in value.items() if isinstance(inner, dict)]:
        raise UserError(f"config.json: {name}: got one for each of {', '.join(nested)}, must be one for all layers")
    return value


def _kind(own: Mapping[str, Any]) -> str:
    """Key of `SCALINGS`: "rope_type", or "type" in older files."""
    kinds = {ALIASES.get(own[name], own[name]) for name in ("rope_type", "type") if own.get(name) is not None}
    if len(kinds) > 1:
        raise UserError(f"config.json: rope_parameters: got rope_type {own['rope_type']!r} and type {own['type']!r}")
    kind = next(iter(kinds), "default")
    if kind not in SCALINGS:
        raise UserError(f"config.json: rope_scaling: got {kind!r}, must be one of {', '.join(SCALINGS)}")
    return kind


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
                lengths["max_position_embeddings"] = round(positions.scaling.original_length * positions.scaling.factor)
            return {
                **top,
                **lengths,
                **({} if kind == "default" else {"rope_scaling": {**top, **scaling}}),
                "rope_parameters": {**top, **scaling},
            }
    return {}


def _tuple(value: Json) -> Json:
    return tuple(value) if isinstance(value, list) else value
