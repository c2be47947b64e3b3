"""`generation_config.json`: a published model's sampling settings and the tokens that begin and end a text.

Each field is read, is known not to change a text, or is named in a warning.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from gptjax.inference.sampling import Sampling
from gptjax.interop.multimodal import read_config
from gptjax.types import UserError

NAME = "generation_config.json"
DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Fields of `Sampling` that matter only where tokens are drawn."""
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
"""Penalties, of which `transformers` has the first."""
READ = {"do_sample", "eos_token_id", "decoder_start_token_id", "pad_token_id", *PENALTIES, *DRAWING}
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "top_h": (1,),
}
"""Field -> values that change nothing, besides null, false, 0 and empty ones."""
HARMLESS = {"bos_token_id", "transformers_version", "_from_model_config", "max_length", "max_new_tokens"} | {
    # of how a text is computed or handed over
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "output_attentions", "output_scores"),
    *("output_hidden_states", "output_logits", "return_dict_in_generate", "compile_config", "disable_compile"),
    *("low_memory", "prefill_chunk_size", "continuous_batching_config", "renormalize_logits", "remove_invalid_values"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("max_matching_ngram_size", "use_mtp", "speculation_type"),
    *("length_penalty", "early_stopping", "diversity_penalty", "num_return_sequences"),  # of beams and of copies
}


def read_sampling(folder: str | Path) -> Sampling | None:
    """The sampling settings of the folder's generation_config.json. None: it does not say.

    No limit is `top_k` 0 or less, and `top_p` 0 the most likely token. Warns of settings that cannot be and of fields
    that would change a text and are not implemented."""
    fields = _fields(folder)
    drawn = bool(fields.get("do_sample"))
    unknown = [
        f"{name} {json.dumps(value)}"
        for name, value in fields.items()
        if name not in READ | HARMLESS and value not in (None, False, "", [], {}, *WITHOUT_EFFECT.get(name, ()))
    ]
    settings: dict[str, Any] = {} if drawn or "do_sample" not in fields else {"temperature": 0}
    for name in (*PENALTIES, *DRAWING) if drawn else PENALTIES:
        value = fields.get(name)
        if name == "top_k" and isinstance(value, int | float) and value <= 0:
            value = None
        if name == "top_p" and value == 0 and value is not False:
            name, value = "top_k", 1
        if value is None:
            continue
        try:
            setting: dict[str, Any] = {name: value}
            Sampling(**setting)
            settings |= setting
        except (UserError, TypeError):
            unknown.append(f"{name} {json.dumps(value)}")
    if unknown:
        warnings.warn(
            f"{NAME}: got {', '.join(unknown)}, which gptjax does not have; texts are written without",
            stacklevel=2,
        )
    return None if fields.get("do_sample") is None else Sampling(**settings)


def read_stop_token_ids(folder: str | Path, vocab: int | None = None) -> tuple[int, ...] | None:
    """The tokens that end a text of the folder's model. None: the folder does not say. Raises UserError if the model,
    with a vocabulary of `vocab`, can write none of them."""
    found = [file.get("eos_token_id") for file in (_fields(folder), read_config(folder))]
    ids = next((ids for ids in found if ids is not None), None)
    if ids is None:
        return None
    ids = (ids,) if isinstance(ids, int) else tuple(ids)
    if vocab is not None and ids and min(ids) >= vocab:
        raise UserError(
            f"eos_token_id: got {', '.join(map(str, ids))} in {folder}, must be less than the model's vocabulary of "
            f"{vocab}: no text would end"
        )
    return ids


def read_decoder_start_token_id(folder: str | Path) -> int:
    """The first token of every target of a folder's encoder-decoder; the padding token if the folder names none."""
    files = [_fields(folder), read_config(folder)]
    keys = ("decoder_start_token_id", "pad_token_id")
    return next((file[key] for key in keys for file in files if file.get(key) is not None), 0)


def of_sampling(sampling: Sampling) -> dict[str, Any]:
    """The fields of generation_config.json: the inverse of `read_sampling`."""
    settings: dict[str, Any] = dataclasses.asdict(sampling)
    absent = {"frequency_penalty": 0, "presence_penalty": 0}
    settings = {name: value for name, value in settings.items() if value is not None and value != absent.get(name)}
    settings.setdefault("top_k", 0)  # 0: no limit; the default of `transformers` is 50
    if sampling.greedy:
        settings = {name: settings[name] for name in PENALTIES if name in settings}
    return {"do_sample": not sampling.greedy, **settings}


def _fields(folder: str | Path) -> dict[str, Any]:
    return read_config(folder, NAME) if (Path(folder) / NAME).is_file() else {}
