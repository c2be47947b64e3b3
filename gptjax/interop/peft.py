"""Adapters in the format of Hugging Face's PEFT, in and out: `adapter_config.json` and `adapter_model.safetensors`.

    lora, adapters = peft.read("folder", config)
    params = lora.merge(params, adapters)
    peft.write("other", lora, adapters, config)          # with the names of the family that can express the model

A module of theirs, with in and out features, has three tensors, where ours has "a", "b" and "magnitude":

    base_model.model.{module}.lora_A.weight                [r, in]
    base_model.model.{module}.lora_B.weight                [out, r]
    base_model.model.{module}.lora_magnitude_vector        [out], DoRA alone

A module that holds several of our matrices, as GPT-2's `c_attn` holds q, k and v, is read as one adapter each with the
same A. It is written with the A of all side by side and a B of blocks: the same product, at the rank of their sum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.interop import huggingface, safetensors
from gptjax.interop.families import FAMILIES, Family, gpt2
from gptjax.nn import DoRA, LoRA, TransformerConfig
from gptjax.nn.stack import place
from gptjax.parameters import MATRICES, matrix
from gptjax.types import Array, Params, UserError

Modules = Mapping[str, tuple[str, ...]]
"""Their module -> our matrices in it, in the order of its outputs; {L} is the number of a layer."""


def _of(*families: Family) -> Modules:
    """The modules of families, by their tables of names. Left out are those whose outputs alternate between matrices
    (GPT-NeoX), and stacks of experts."""
    modules: dict[str, tuple[str, ...]] = {}
    for family in families:
        own: dict[str, tuple[str, ...]] = {}
        for row in family.table:
            name, path = row.theirs.removesuffix(".weight"), row.ours.removeprefix("blocks/{L}/")
            one = row.theirs != name and row.ours != path and "{E}" not in name and matrix(path.split("/"))
            blocks = "+" not in row.their_layout or re.search(r"\(\S*\+", row.their_layout)  # of outputs, side by side
            if one and blocks:
                own[name] = (*own.get(name, ()), path)
        modules = own | modules
    return modules


ALL = _of(*(family for family in FAMILIES if family.kind is TransformerConfig))
"""A name says the same in every family that has it."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}


def read(folder: str | Path, config: TransformerConfig, modules: Modules = ALL) -> tuple[LoRA, Params]:
    """The adapters in a folder, for this model, whichever family's names they have. Layers without one get zeros, which
    change nothing.

    Raises UserError for what is not LoRA or DoRA on linear layers, for tensors that no matrix has or of a wrong shape,
    and for files that are missing or damaged.
    """
    folder = Path(folder)
    fields = _fields(folder)
    rank, alpha = fields["r"], float(fields["lora_alpha"])
    kind = DoRA if fields.get("use_dora") else LoRA
    if not (folder / TENSORS).is_file():
        raise UserError(f"path: got {folder}, which lacks {TENSORS}")
    tensors = safetensors.Tensors(folder / TENSORS)
    ours = _matrices(config)
    left = set(tensors)
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}  # path -> layer on its stack -> adapter
    lora = kind(rank, alpha, ("q",), bool(fields.get("use_rslora")))
    for layer, theirs, parts in _modules(config, modules):
        names = {part: PREFIX + theirs + ending for part, ending in KINDS.items()}
        if names["a"] not in tensors:
            continue
        needed = ("a", "b", "magnitude") if kind is DoRA else ("a", "b")
        if lacking := [names[part] for part in needed if names[part] not in tensors]:
            raise UserError(f"path: got {folder}, which lacks {', '.join(lacking)}")
        arrays = {part: np.asarray(tensors[names[part]], np.float32) for part in needed}
        left -= {names[part] for part in needed}
        shapes = [ours[path, layer] for path in parts]
        sizes = [MATRICES[path.split("/")[-1]].size(shape) for path, shape in zip(parts, shapes, strict=True)]
        r, inputs, outputs = len(arrays["a"]), sizes[0][0], sum(size[1] for size in sizes)
        want = {"a": (r, inputs), "b": (outputs, r), "magnitude": (outputs,)}
        for part, array in arrays.items():
            if array.shape != want[part]:
                raise UserError(f"path: got {folder}, where {names[part]} is {array.shape}, must be {want[part]}")
        # What other modules are scaled by is in our B; the pattern for this one may say something else.
        own = kind(r, float(_pattern(fields, "alpha_pattern", theirs, alpha)), ("q",), lora.rank_stabilised)
        arrays["b"] = arrays["b"] * (own.scale / lora.scale)
        start = 0
        for path, shape, (_, size) in zip(parts, shapes, sizes, strict=True):
            _, before, after = MATRICES[path.split("/")[-1]].split(shape)
            rows = slice(start, start := start + size)
            adapter = {"a": arrays["a"].T.reshape(*before, r), "b": arrays["b"][rows].T.reshape(r, *after)}
            if kind is DoRA:
                adapter["magnitude"] = arrays["magnitude"][rows].reshape(after)
            found.setdefault(path, {})[layer] = adapter
    if left or not found:
        some = ", ".join(sorted(left)[:3]) or "none"
        raise UserError(f"path: got {folder}, whose tensors are of no matrix in this model: {some}")
    match = tuple(sorted(found))
    return kind(rank, alpha, match, lora.rank_stabilised), _stacked(config, found, kind is DoRA)


def write(
    folder: str | Path, lora: LoRA, adapters: Params, config: TransformerConfig, model_type: str | None = None
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` reads beside the model that `save_hf` wrote.

    model_type  the family whose names it has; None: the first that can express the model, as in `save_hf`

    Raises UserError if the folder is there, for a model that no family can express, and for adapters of matrices that
    are no linear layers in the family: GPT-NeoX's queries, keys and values, which take turns, and experts."""
    folder = Path(folder)
    family = huggingface.expressing(config, model_type)
    modules = _of(family)
    if folder.exists():
        raise UserError(f"path: got {folder}, which exists already; choose another or delete it")
    shapes = _matrices(config)
    unstacked = {(path, layer): _layer(adapters, config, path, layer) for path, layer in shapes}
    left = {path for (path, _), adapter in unstacked.items() if adapter is not None}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for layer, theirs, parts in _modules(config, modules):
        have = [unstacked.get((path, layer)) for path in parts]
        left -= set(parts)
        if all(adapter is None for adapter in have):
            continue
        if isinstance(lora, DoRA) and None in have:
            lacking = [path for path, adapter in zip(parts, have, strict=True) if adapter is None]
            raise UserError(f"lora.match: got none for {', '.join(lacking)}, which {theirs} holds too; DoRA needs all")
        a, b, magnitudes = [], [], []
        for path, adapter in zip(parts, have, strict=True):
            inputs, outputs = MATRICES[path.split("/")[-1]].size(shapes[path, layer])
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
        for part, array in arrays.items():
            tensors[PREFIX + theirs + KINDS[part]] = np.ascontiguousarray(array, np.float32)
    if left:
        raise UserError(
            f"lora.match: got adapters of {', '.join(sorted(left))}, which are no linear layers of {family.model_type}"
        )
    others = {theirs: rank for theirs, rank in ranks.items() if rank != lora.rank}
    power = 0.5 if lora.rank_stabilised else 1.0  # the scale is alpha / rank^power, and the same for all
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({theirs.split(".")[-1] for theirs in ranks})
        if _alike(ranks, config, modules)
        else sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {theirs: lora.alpha * (rank / lora.rank) ** power for theirs, rank in others.items()},
        "use_rslora": lora.rank_stabilised,
        "use_dora": isinstance(lora, DoRA),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family is gpt2.FAMILY,  # whose weights lie [in, out]
        "inference_mode": True,
    }
    partial = folder.with_name(folder.name + ".partial")
    safetensors.write(partial, tensors, tensors.__getitem__)
    (partial / safetensors.SINGLE).rename(partial / TENSORS)
    (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    partial.rename(folder)


def _alike(ranks: Mapping[str, int], config: TransformerConfig, modules: Modules) -> bool:
    """Whether the last name of a module says which have adapters."""
    ends = {theirs.split(".")[-1] for theirs in ranks}
    return all(theirs in ranks for _, theirs, _ in _modules(config, modules) if theirs.split(".")[-1] in ends)


def _fields(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / CONFIG).read_text())
        if lacking := {"r", "lora_alpha", "peft_type"} - set(fields):
            raise KeyError(*lacking)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"path: got {folder}, whose {CONFIG} is missing or damaged ({error!r})") from None
    for field, known in (("peft_type", ("LORA",)), ("bias", ("none",)), ("modules_to_save", ([],)), ("lora_bias", ())):
        if (got := fields.get(field)) and got not in known:
            raise UserError(f"{CONFIG}: {field}: got {got!r}, must be {' or '.join(map(repr, known)) or 'false'}")
    return fields


def _pattern(fields: dict[str, Any], name: str, module: str, default: float) -> float:
    """What a pattern says of a module: it names the ends of modules, as theirs does."""
    for end, value in (fields.get(name) or {}).items():
        if module == end or module.endswith("." + end):
            return value
    return default


def _modules(config: TransformerConfig, modules: Modules) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Layer, module and matrices, for all that this model has."""
    there = _matrices(config)
    for layer in range(config.layers):
        for theirs, parts in modules.items():
            if all((path, layer) in there for path in parts):
                yield layer, theirs.replace("{L}", str(layer)), parts


def _matrices(config: TransformerConfig) -> dict[tuple[str, int], tuple[int, ...]]:
    """(path in its block, layer) -> shape."""
    D, shapes = config.width, {}
    for layer, block in enumerate(config.stack().blocks):
        N, H, F = block.attention.heads or 0, block.attention.head_size or 0, block.hidden
        K = block.attention.kv_heads or N
        sides = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D)}
        shapes |= {(f"attention/{name}", layer): shape for name, shape in sides.items()}
        if block.mlp is None:
            continue
        names = ("gate", "up") if block.mlp.gated else ("up",)
        shapes |= {(f"mlp/{name}", layer): (D, F) for name in names} | {("mlp/down", layer): (F, D)}
    return shapes


def _layer(adapters: Params, config: TransformerConfig, path: str, layer: int) -> dict[str, np.ndarray] | None:
    """The adapter of one layer's matrix, None where there is none."""
    names, index = place(config.stack(), layer)
    tree: Any = adapters
    for name in ("blocks", *names, *path.split("/")):
        if name not in tree:
            return None
        tree = tree[name]
    return {part: np.asarray(array if index is None else array[index], np.float32) for part, array in tree.items()}


def _stacked(config: TransformerConfig, found: dict[str, dict[int, dict[str, np.ndarray]]], dora: bool) -> Params:
    """The tree of adapters, as the model's parameters lie."""
    stack, tree = config.stack(), {}
    leaves: dict[tuple[str, ...], list[tuple[str, int, int | None]]] = {}
    for path in found:
        for layer in range(config.layers):
            names, index = place(stack, layer)
            leaves.setdefault(("blocks", *names, *path.split("/")), []).append((path, layer, index))
    for names, layers in leaves.items():
        there = [found[path].get(layer) for path, layer, _ in layers]
        one = next((adapter for adapter in there if adapter is not None), None)
        if one is None:
            continue
        if dora and None in there:
            raise UserError(f"path: some layers have no adapter of {'/'.join(names)}; DoRA must have all")
        if len({adapter["a"].shape for adapter in there if adapter}) > 1:
            raise UserError(f"path: the adapters of {'/'.join(names)} have several ranks, must be of one")
        zeros = {part: np.zeros_like(array) for part, array in one.items()}
        adapters = [zeros if adapter is None else adapter for adapter in there]
        single = layers[0][2] is None

        def leaf(part: str, adapters: list[dict[str, np.ndarray]] = adapters, single: bool = single) -> Array:
            return jnp.asarray(adapters[0][part] if single else np.stack([adapter[part] for adapter in adapters]))

        branch = tree
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
        branch[names[-1]] = {part: leaf(part) for part in one}
    return tree


def _blocks(b: list[np.ndarray]) -> np.ndarray:
    """The matrices [out, r] as blocks along the diagonal of one."""
    whole = np.zeros((sum(len(x) for x in b), sum(x.shape[1] for x in b)), np.float32)
    row = column = 0
    for x in b:
        whole[row : row + x.shape[0], column : column + x.shape[1]] = x
        row, column = row + x.shape[0], column + x.shape[1]
    return whole
