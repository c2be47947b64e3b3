"""The language model inside a published vision-language model (Gemma 3 from 4B on, Mistral Small 3.1): its fields and
its tensors. The vision encoder is left out, so only text can be read and written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.interop.families import Fields
from gptjax.interop.safetensors import Renamed
from gptjax.interop.schema import check_types
from gptjax.io.json_file import read_object
from gptjax.types import UserError, one_line

INNER = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
"""Prefix of the language model's tensors, in two versions; `model.` in files of text models."""
HEAD = "lm_head.weight"
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4_096,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }
}
"""Defaults of `transformers` for fields that such a config.json leaves out, by model type."""


def read_config(folder: str | Path, name: str = "config.json") -> Fields:
    """Read a folder's config.json or another file of fields; of a vision-language model, the language model's
    fields."""
    try:
        fields = text_fields(read_object(Path(folder) / name))
    except (OSError, ValueError) as error:
        raise UserError(f"path: got {folder}, whose {name} is missing or damaged ({one_line(error)})") from None
    check_types(fields, name)
    return Fields(fields)


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that describe the language model; all fields of a text model."""
    if not isinstance(inner := config.get("text_config"), dict):
        return dict(config)
    return {**config, **DEFAULTS.get(str(inner.get("model_type")), {}), **inner}


def text_tensors(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The tensors of the language model, by their names in files of text models; all tensors of such a file."""
    names = {HEAD if name.endswith(HEAD) else INNER.sub("model.", name): name for name in tensors}
    inner = {ours: name for ours, name in names.items() if ours == HEAD or INNER.match(name)}
    return Renamed(tensors, inner) if any(map(INNER.match, tensors)) else tensors
