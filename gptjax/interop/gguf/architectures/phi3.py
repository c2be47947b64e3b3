"""Phi-3 and Phi-4: merged projections, LongRoPE. llama.cpp has their merged matrices too, but not their window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptjax.interop.families import Fields
from gptjax.interop.gguf import rope
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, expanded, shortest
from gptjax.interop.gguf.architectures import llama

JOINED = expanded(
    {
        "self_attn.qkv_proj.weight": "attn_qkv.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "mlp.gate_up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
    },
    *llama.LAYER,
)
TABLE = (*llama.ENDS, *JOINED, *llama.NORMS)


def write(c: Fields) -> Metadata:
    given = c["rope_parameters"]
    keys = {**llama.plain(c), "rope.dimension_count": rope.rotated(c, c["head_dim"])}
    keys |= rope.write(given, "longrope")
    if given["rope_type"] == "longrope":
        keys["rope.scaling.original_context_length"] = given["original_max_position_embeddings"]
        keys["context_length"] = round(given["original_max_position_embeddings"] * given["factor"])
        keys["rope.scaling.attn_factor"] = float(given.get("attention_factor") or _amplitude(given))
    return keys


def read(keys: Keys) -> dict[str, Any]:
    fields = llama.of_plain(keys)
    window = keys.integer("attention.sliding_window", 0) or None
    original = keys.integer("rope.scaling.original_context_length", fields["max_position_embeddings"])
    amplitude = keys.number("rope.scaling.attn_factor", 1.0)
    given = rope.read(keys, fields["head_dim"])
    if keys.has_tensor(rope.LONG):
        shape = (keys.integer("rope.dimension_count", fields["head_dim"]) // 2,)
        given |= {
            "rope_type": "longrope",
            "short_factor": [shortest(x) for x in keys.tensor(rope.SHORT, shape)],
            "long_factor": [shortest(x) for x in keys.tensor(rope.LONG, shape)],
            "original_max_position_embeddings": original,
            "factor": max(fields["max_position_embeddings"] / max(original, 1), 1.0),
        }
        if original < 2 or not math.isclose(_amplitude(given), amplitude, rel_tol=1e-6):
            given["attention_factor"] = amplitude
    return {
        **fields,
        "model_type": "phi3",
        "rope_parameters": given,
        "sliding_window": window,
        "original_max_position_embeddings": original,
    }


def tensors(c: Fields) -> dict[str, np.ndarray]:
    given = c["rope_parameters"]
    if given["rope_type"] != "longrope":
        return {}
    return {
        name: np.array(given[f"{key}_factor"], np.float32) for name, key in ((rope.LONG, "long"), (rope.SHORT, "short"))
    }


def _amplitude(given: dict[str, Any]) -> float:
    """LongRoPE's factor of cosine and sine."""
    return math.sqrt(1 + math.log(given["factor"]) / math.log(given["original_max_position_embeddings"]))


ARCHITECTURE = Architecture("phi3", ("phi3",), TABLE, write, read, tensors=tensors)
