"""The fields of PEFT's `adapter_config.json`: each is read, is known not to change what a trained adapter computes, or
must be unset."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.interop.schema import check_types
from gptjax.io.json_file import read_object
from gptjax.types import Json, UserError

CONFIG = "adapter_config.json"
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The other initialisations subtract the initial adapter from the model's own matrices when an adapter is read.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Field -> values that we compute; the first is the default."""
READ = {"r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"} | {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"} | {  # descriptions
    "inference_mode",
    "lora_dropout",  # of training
    "fan_in_fan_out",  # PEFT sets it by the layer's class
    "megatron_core",
    "loftq_config",  # of initialisations, which `ALLOWED` excludes where they matter
    "eva_config",
    "qalora_group_size",  # of `use_qalora`, which must be unset
    "runtime_config",
    "ensure_weight_tying",
}


class AdapterFields(dict[str, Any]):
    """The fields of an adapter. Raises UserError for missing and damaged files and, by name, for a field that changes
    the result and is not implemented."""

    def __init__(self, folder: Path):
        try:
            fields = read_object(folder / CONFIG)
            if lacking := {"r", "lora_alpha", "peft_type"} - fields.keys():
                raise KeyError(*lacking)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"path: got {folder}, whose {CONFIG} is missing or damaged ({error!r})") from None
        super().__init__(fields)
        check_types(fields, CONFIG)
        for name, known in ALLOWED.items():
            if not any(self.get(name, known[0]) is value or self.get(name) == value for value in known):
                options = " or ".join(json.dumps(value) for value in known)
                raise UserError(f"{CONFIG}: {name}: got {json.dumps(self[name])[:80]}, must be {options}")
        for name, value in self.items():
            if name not in READ | HARMLESS | ALLOWED.keys() and value not in (None, False, "", [], {}):
                raise UserError(
                    f"{CONFIG}: {name}: got {json.dumps(value)[:80]}, which is not supported; merge the adapter with "
                    "peft's merge_and_unload() and load the merged model"
                )
        for name in ("r", "lora_alpha"):
            if isinstance(self[name], bool) or not isinstance(self[name], int | float) or self[name] <= 0:
                raise UserError(f"{CONFIG}: {name}: got {json.dumps(self[name])[:80]}, must be a positive number")
        for name in ("alpha_pattern", "rank_pattern"):
            if not isinstance(self.get(name) or {}, dict):
                raise UserError(f"{CONFIG}: {name}: got {json.dumps(self[name])[:80]}, must be an object")

    def alpha(self, module: str) -> float:
        """The numerator of the module's scale."""
        return float(self._pattern("alpha_pattern", module, self["lora_alpha"]))

    def rank(self, module: str) -> int:
        """The rank of the module's adapter."""
        return int(self._pattern("rank_pattern", module, self["r"]))

    def targets(self, module: str) -> bool:
        """True if PEFT gives this module an adapter."""
        target, excluded = self.get("target_modules"), self.get("exclude_modules")
        if excluded and _named(excluded, module):
            return False
        if target is None or target == "all-linear":
            return True  # the model's own choice: the modules that have tensors
        layers = self.get("layers_to_transform")
        if isinstance(target, str) or module in target or layers is None or layers == []:
            return _named(target, module)
        patterns = self.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next((m for p in patterns if (m := _match(rf"(?:^|.*?\.)(?:{p})\.(\d+)\.", module))), None)
        layers = [layers] if isinstance(layers, int) else layers
        return _named(target, module) and found is not None and int(found[1]) in layers

    def _pattern(self, name: str, module: str, default: Json) -> Any:
        """The value of a module in a mapping whose keys are regular expressions for the end of a module's name."""
        patterns: Mapping[str, Any] = self.get(name) or {}
        return next((value for key, value in patterns.items() if _match(rf"(?:.*\.)?(?:{key})$", module)), default)


def _named(target: str | list[str], module: str) -> bool:
    """True if the regular expression is the module's name, or one of the list its last components."""
    if isinstance(target, str):
        return _match(rf"(?:{target})\Z", module) is not None
    return any(module == name or module.endswith("." + name) for name in target)


def _match(pattern: str, module: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, module)
    except re.error as error:
        raise UserError(f"{CONFIG}: got the pattern {pattern!r}, which is no regular expression ({error})") from None
