"""Read and write LoRA adapters in the format of Hugging Face's PEFT: `adapter_config.json` and
`adapter_model.safetensors`.

    lora, adapters = peft.read("folder", config)
    params = lora.merge(params, adapters)
    peft.write("other", lora, adapters, config)          # with the names of the family that can express the model

A PEFT module, a linear layer with in and out features, has three tensors, which are our "a", "b" and "magnitude":

    base_model.model.{module}.lora_A.weight                [r, in]
    base_model.model.{module}.lora_B.weight                [out, r]
    base_model.model.{module}.lora_magnitude_vector        [out], DoRA only

A module that holds several of our matrices, as GPT-2's `c_attn` holds q, k and v, is read as one adapter per matrix,
all with the same A. It is written with the As concatenated and a block-diagonal B: the same product, at the sum of the
ranks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.distributed.parameters import ParamInfo, flat, nested, parameter_info
from gptjax.interop import huggingface, safetensors
from gptjax.interop.families import FAMILIES, Family, Row, gpt2
from gptjax.interop.peft_fields import CONFIG, AdapterFields
from gptjax.io import atomic
from gptjax.nn import DoRA, LoRA, TransformerConfig
from gptjax.types import Array, Params, UserError

Modules = Mapping[str, tuple[Row, ...]]
"""PEFT module -> our matrices in it, in the order of its outputs; {L} is the index of a layer."""
BLOCK = "blocks/{L}/"


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of our matrices in a PEFT module."""

    path: str
    """Path within the block."""
    leaf: str
    """Name of the parameter."""
    index: int | None
    """Index of the layer in a stacked parameter. None: not stacked."""
    info: ParamInfo


def _of(*families: Family) -> Modules:
    """The modules of families, from their tables of names, without stacks of experts and modules whose outputs
    alternate between matrices (GPT-NeoX, Falcon, BLOOM; DeepSeek-V3's keys and values)."""
    modules: dict[str, tuple[Row, ...]] = {}
    for family in families:
        own: dict[str, tuple[Row, ...]] = {}
        for row in family.table:
            name = row.theirs.removesuffix(".weight")
            one = row.theirs != name and row.ours.startswith(BLOCK) and "{E}" not in name
            blocks = "+" not in row.their_layout or re.search(r"\(\S*\+", row.their_layout)  # of outputs, side by side
            if one and blocks:
                own[name] = (*own.get(name, ()), row)
        modules = own | modules
    return modules


ALL = _of(*(family for family in FAMILIES if family.kind is TransformerConfig))
"""The modules of all families of decoders; a name means the same in every family that has it."""
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}


def read(folder: str | Path, config: TransformerConfig, modules: Modules = ALL) -> tuple[LoRA, Params]:
    """Read the adapters in a folder for this model, with the names of any family. Layers without an adapter get zeros,
    which change nothing.

    Raises UserError for anything but LoRA or DoRA on linear layers, for a field of the configuration that changes the
    result and is not implemented, for tensors of no matrix of the model or of the wrong shape, and for missing or
    damaged files.
    """
    folder = Path(folder)
    fields = AdapterFields(folder)
    rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
    kind = DoRA if fields.get("use_dora") else LoRA
    if not (folder / TENSORS).is_file():
        raise UserError(f"path: got {folder}, which lacks {TENSORS}")
    tensors = safetensors.Tensors(folder / TENSORS)
    info = flat(parameter_info(config.build()))
    left = set(tensors)
    found: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}  # parameter -> entry -> adapter
    paths: dict[str, str] = {}
    lora = kind(rank, alpha, ("q",), bool(fields.get("use_rslora")))
    for theirs, parts in _modules(config, info, modules):
        names = {part: PREFIX + theirs + ending for part, ending in KINDS.items()}
        if names["a"] not in tensors:
            continue
        if not fields.targets(theirs):
            raise UserError(f"path: got {folder}, with an adapter of {theirs}, which {CONFIG} does not target")
        needed = ("a", "b", "magnitude") if kind is DoRA else ("a", "b")
        if lacking := [names[part] for part in needed if names[part] not in tensors]:
            raise UserError(f"path: got {folder}, which lacks {', '.join(lacking)}")
        arrays = {part: np.asarray(tensors[names[part]], np.float32) for part in needed}
        left -= {names[part] for part in needed}
        sizes = [part.info.fan for part in parts]
        r, inputs, outputs = fields.rank(theirs), sizes[0][0], sum(size[1] for size in sizes)
        want = {"a": (r, inputs), "b": (outputs, r), "magnitude": (outputs,)}
        for name, array in arrays.items():
            if array.shape != want[name]:
                raise UserError(f"path: got {folder}, where {names[name]} is {array.shape}, must be {want[name]}")
        # `alpha_pattern` may give this module another scale than `lora`'s; the ratio goes into B.
        own = kind(r, fields.alpha(theirs), ("q",), lora.rank_stabilised)
        arrays["b"] = arrays["b"] * (own.scale / lora.scale)
        start = 0
        for part, (_, size) in zip(parts, sizes, strict=True):
            _, before, after = part.info.split(part.info.shape)
            rows = slice(start, start := start + size)
            adapter = {"a": arrays["a"].T.reshape(*before, r), "b": arrays["b"][rows].T.reshape(r, *after)}
            if kind is DoRA:
                adapter["magnitude"] = arrays["magnitude"][rows].reshape(after)
            found.setdefault(part.leaf, {})[part.index] = adapter
            paths[part.leaf] = part.path
    if left or not found:
        some = ", ".join(sorted(left)[:3]) or "none"
        raise UserError(f"path: got {folder}, whose tensors belong to no matrix of this model: {some}")
    match = {path if _all(path, info, found) else leaf for leaf, path in paths.items()}
    adapters = _stacked(found, config.stack().repeats, kind is DoRA)
    return kind(rank, alpha, tuple(sorted(match)), lora.rank_stabilised), adapters


def write(
    folder: str | Path, lora: LoRA, adapters: Params, config: TransformerConfig, model_type: str | None = None
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` reads on top of the model that `save_hf` wrote.

    model_type  family whose names are used. None: the first that can express the model, as in `save_hf`

    Raises UserError if the folder exists, for adapters of a quantised base, for a model that no family can express, and
    for adapters of matrices that are not linear layers of the family: queries, keys and values of GPT-NeoX, Falcon and
    BLOOM and DeepSeek-V3's keys and values, which are interleaved, and experts."""
    folder = Path(folder)
    if lora.bits is not None:
        raise UserError(
            f"lora.bits: got {lora.bits}, must be None: peft would add the adapters to the base before it was rounded; "
            "merge them instead"
        )
    family = huggingface.expressing(config, model_type)
    modules = _of(family)
    if folder.exists():
        raise UserError(f"path: got {folder}, which exists already; choose another or delete it")
    info = flat(parameter_info(config.build()))
    given: dict[str, dict[str, Any]] = {}  # parameter -> adapter
    for name, array in flat(adapters).items():
        leaf, _, kind = name.rpartition("/")
        given.setdefault(leaf, {})[kind] = array
    left = set(given)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for theirs, parts in _modules(config, info, modules):
        have = [_entry(given.get(part.leaf), part.index) for part in parts]
        left -= {part.leaf for part in parts}
        if all(adapter is None for adapter in have):
            continue
        if isinstance(lora, DoRA) and None in have:
            lacking = [part.path for part, adapter in zip(parts, have, strict=True) if adapter is None]
            raise UserError(f"lora.match: got none for {', '.join(lacking)}, which {theirs} also holds; DoRA needs all")
        a, b, magnitudes = [], [], []
        for part, adapter in zip(parts, have, strict=True):
            inputs, outputs = part.info.fan
            if adapter is None:
                adapter = {"a": np.zeros((inputs, 0)), "b": np.zeros((0, outputs))}
            rank = adapter["a"].shape[-1]
            a.append(adapter["a"].reshape(inputs, rank).T)
            b.append(adapter["b"].reshape(rank, outputs).T)
            magnitudes += [adapter["magnitude"].ravel()] if "magnitude" in adapter else []
        arrays = {"a": np.concatenate(a), "b": _blocks(b)}
        if magnitudes:
            arrays["magnitude"] = np.concatenate(magnitudes)
        ranks[theirs] = len(arrays["a"])
        for kind, array in arrays.items():
            tensors[PREFIX + theirs + KINDS[kind]] = np.ascontiguousarray(array, np.float32)
    if left:
        raise UserError(
            f"lora.match: got adapters of {', '.join(sorted(left))}, which are not linear layers of {family.model_type}"
        )
    others = {theirs: rank for theirs, rank in ranks.items() if rank != lora.rank}
    power = 0.5 if lora.rank_stabilised else 1.0  # the scale, alpha / rank^power, is the same for all modules
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({theirs.split(".")[-1] for theirs in ranks})
        if _alike(ranks, {theirs for theirs, _ in _modules(config, info, modules)} | _experts(family))
        else sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {theirs: lora.alpha * (rank / lora.rank) ** power for theirs, rank in others.items()},
        "use_rslora": lora.rank_stabilised,
        "use_dora": isinstance(lora, DoRA),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family is gpt2.FAMILY,  # its weights are [in, out]
        "inference_mode": True,
    }
    with atomic.new(folder) as partial:
        safetensors.write(partial, tensors, tensors.__getitem__, single=TENSORS)
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _alike(ranks: Mapping[str, int], modules: set[str]) -> bool:
    """True if the last component of a module's name determines whether it has an adapter."""
    ends = {theirs.split(".")[-1] for theirs in ranks}
    return all(theirs in ranks for theirs in modules if theirs.split(".")[-1] in ends)


def _experts(family: Family) -> set[str]:
    """The modules of experts; the last component of their names may be that of other modules."""
    return {row.theirs.removesuffix(".weight") for row in family.table if "{E}" in row.theirs}


def _modules(
    config: TransformerConfig, info: Mapping[str, ParamInfo], modules: Modules
) -> Iterator[tuple[str, list[_Part]]]:
    """The modules of this model, layer by layer, with their matrices."""
    for layer in range(config.layers):
        names, index = config.stack().location(layer)
        block = "/".join(("blocks", *names, ""))
        for theirs, rows in modules.items():
            parts = [part for row in rows if (part := _part(row, block, index, info)) is not None]
            if len(parts) == len(rows):
                yield theirs.replace("{L}", str(layer)), parts


def _part(row: Row, block: str, index: int | None, info: Mapping[str, ParamInfo]) -> _Part | None:
    """The matrix of a row in a block. None: the block does not have it, or has a stack of experts."""
    path = row.ours.removeprefix(BLOCK)
    present, absent = (name.replace(BLOCK, block) for name in (row.if_present, row.if_absent))
    found = info.get(block + path)
    if found is None or not found.is_matrix or found.batch > found.stacked:
        return None
    return None if absent in info or (present and present not in info) else _Part(path, block + path, index, found)


def _all(path: str, info: Mapping[str, ParamInfo], found: Mapping[str, Any]) -> bool:
    """True if all parameters at this path have adapters."""
    return all(name in found for name in info if name.endswith("/" + path))


def _entry(adapter: Mapping[str, Any] | None, index: int | None) -> dict[str, np.ndarray] | None:
    """One layer's slice of an adapter. None: there is no adapter."""
    if adapter is None:
        return None
    return {kind: np.asarray(x if index is None else x[index], np.float32) for kind, x in adapter.items()}


def _stacked(found: dict[str, dict[int | None, dict[str, np.ndarray]]], repeats: int, dora: bool) -> Params:
    """The tree of adapters, stacked as the model's parameters are. repeats: number of stacked layers."""
    tree: dict[str, Array] = {}
    for leaf, entries in found.items():
        adapters = list(entries.values()) if None in entries else [entries.get(i) for i in range(repeats)]
        if dora and None in adapters:
            raise UserError(f"path: some layers have no adapter of {leaf}; DoRA needs all")
        if len({adapter["a"].shape for adapter in entries.values()}) > 1:
            raise UserError(f"path: the adapters of {leaf} have different ranks, must have one")
        for kind, like in next(iter(entries.values())).items():
            arrays = [np.zeros_like(like) if adapter is None else adapter[kind] for adapter in adapters]
            tree[f"{leaf}/{kind}"] = jnp.asarray(arrays[0] if None in entries else np.stack(arrays))
    return nested(tree)


def _blocks(b: list[np.ndarray]) -> np.ndarray:
    """Block-diagonal matrix of the matrices [out, r]."""
    whole = np.zeros((sum(len(x) for x in b), sum(x.shape[1] for x in b)), np.float32)
    row = column = 0
    for x in b:
        whole[row : row + x.shape[0], column : column + x.shape[1]] = x
        row, column = row + x.shape[0], column + x.shape[1]
    return whole
