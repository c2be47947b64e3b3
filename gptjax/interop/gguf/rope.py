"""Rotary positions in GGUF: keys of the metadata, and tensors of divisors of the frequencies."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from gptjax.interop.families import Fields
from gptjax.interop.gguf.architecture import Keys, Metadata, shortest
from gptjax.types import UserError

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors of R/2 divisors: of all texts; of those within LongRoPE's original length, and of longer ones."""
LLAMA3 = {"original_max_position_embeddings": 8_192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3's settings besides its factor."""
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", *LLAMA3),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""Defaults of llama.cpp, whose bounds are always rounded."""


def rotated(c: Fields, size: int) -> int:
    """Rotated numbers of a head."""
    return int(size * c["rope_parameters"].get("partial_rotary_factor", 1.0))


def write(given: dict[str, Any], *types: str, settings: tuple[str, ...] = ()) -> Metadata:
    """The keys of a rotary encoding, "rope_parameters" of a config.json.

    types     rope_types that the architecture has besides "default", "linear" and "yarn"
    settings  settings of YaRN that it has besides the bounds

    Raises UserError for settings that have no key."""
    values = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kind = values.pop("rope_type")
    if kind == "yarn":
        values = {key: value for key, value in values.items() if YARN.get(key) != value}
    known = {name: NEEDED[name] for name in ("default", "linear", "yarn", *types)}
    optional = {"yarn": ("beta_fast", "beta_slow", *settings), "longrope": ("attention_factor",)}.get(kind, ())
    if kind not in known or not set(known[kind]) <= values.keys() <= {*known[kind], *optional}:
        got = ", ".join(f"{key} {str(value)[:40]}" for key, value in values.items()) or "nothing else"
        options = "; ".join(f"{name} with {', '.join(keys) or 'nothing'}" for name, keys in known.items())
        raise UserError(f"rope_scaling: got {kind} with {got}, GGUF files of this architecture can have {options}")
    if "truncate" in values:
        message = "rope_scaling: got truncate False, which llama.cpp lacks: it rounds YaRN's bounds"
        warnings.warn(message, stacklevel=2)
    keys: Metadata = {"rope.freq_base": float(given["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(values["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = values["original_max_position_embeddings"]
        bounds = [name for name in ("beta_fast", "beta_slow") if name in values]
        keys |= {f"rope.scaling.yarn_{name}": float(values[name]) for name in bounds}
    return keys


def read(keys: Keys, size: int) -> dict[str, Any]:
    """ "rope_parameters" of a config.json, of heads of this size, by the keys."""
    turned = keys.integer("rope.dimension_count", size)
    if not 0 < turned <= size:
        raise UserError(f"{keys.architecture}.rope.dimension_count: got {turned}, must be 1 to the head size, {size}")
    if (theta := keys.number("rope.freq_base", 10_000.0)) <= 1:
        raise UserError(f"{keys.architecture}.rope.freq_base: got {theta}, must be more than 1")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if turned != size:
        fraction = turned / size
        rope["partial_rotary_factor"] = fraction if int(size * fraction) == turned else math.nextafter(fraction, 1)
    kind, factor = keys.text("rope.scaling.type", "linear"), keys.number("rope.scaling.factor", 1.0) or 1.0
    for name in ("yarn_attn_factor", "yarn_ext_factor"):
        keys.only(f"rope.scaling.{name}", 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UserError(f"{keys.architecture}.rope.scaling.type: got {kind[:40]!r}, must be none, linear or yarn")
    if kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        rope["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        rope |= {
            name: keys.number(f"rope.scaling.yarn_{name}", float(YARN[name])) for name in ("beta_fast", "beta_slow")
        }
    return rope


def frequencies(c: Fields) -> dict[str, np.ndarray]:
    """The tensor of divisors of Llama 3's frequencies (arXiv:2407.21783), or of LongRoPE's with one list: 1 for
    wavelengths that are short against the original context, `factor` for long ones, between them
    1 / ((1 - s) / factor + s) with s from 0 to 1."""
    rope = c["rope_parameters"]
    if rope["rope_type"] == "longrope":
        if rope["short_factor"] != rope["long_factor"] or rope.get("attention_factor") != 1:
            raise UserError("rope_scaling: got longrope with two lists, which a GGUF file of this architecture lacks")
        return {FREQUENCIES: np.array(rope["long_factor"], np.float32)}
    if rope["rope_type"] != "llama3":
        return {}
    return {FREQUENCIES: _llama3(rope, rotated(c, c["head_dim"]))}


def read_frequencies(keys: Keys, rope: dict[str, Any], context: int) -> dict[str, Any]:
    """The rotary encoding with the file's tensor of divisors, if it has one: Llama 3's, or LongRoPE with one list."""
    if not keys.has_tensor(FREQUENCIES):
        return rope
    size = keys.integer("rope.dimension_count")
    divisors = keys.tensor(FREQUENCIES, (size // 2,))
    if not (np.isfinite(divisors).all() and (divisors >= 1e-3).all()):
        raise UserError(f"tensors: {FREQUENCIES}: got {divisors.min()} as a divisor, must be positive and finite")
    llama3 = {**rope, "rope_type": "llama3", "factor": shortest(max(divisors.max(), 1)), **LLAMA3}
    if np.allclose(_llama3(llama3, size), divisors, rtol=1e-6, atol=0):
        return llama3
    both = [shortest(divisor) for divisor in divisors]
    found = {"rope_type": "longrope", "short_factor": both, "long_factor": both, "attention_factor": 1.0}
    return {**rope, **found, "factor": 1.0, "original_max_position_embeddings": max(context, 2)}


def _llama3(rope: dict[str, Any], size: int) -> np.ndarray:
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)  # tokens
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    s = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - s) / rope["factor"] + s)).astype(np.float32)
