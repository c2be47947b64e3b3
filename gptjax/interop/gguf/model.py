"""The model in a GGUF file: its metadata and tensors, from those of Hugging Face and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from gptjax.config import differences
from gptjax.interop import huggingface, schema
from gptjax.interop.essence import essence
from gptjax.interop.families import FAMILIES, Fields
from gptjax.interop.gguf.architecture import Keys, Link, links, rounded, shape
from gptjax.interop.gguf.architectures import ARCHITECTURES
from gptjax.interop.gguf.container import Stored
from gptjax.io.json_file import check
from gptjax.nn import Attention, ModelConfig, MultiHeadLatentAttention, RoPE
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Returns the values, of `shape` and any float type; called when they are written."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as described by a GGUF file."""

    architecture: str
    vocab: int
    metadata: dict[str, Any]
    weights: list[Weight]


def describe(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Model:
    """Describe the model of a Hugging Face config.json and its tensors.

    Raises UserError for an architecture or a setting that llama.cpp would compute differently, and for a tensor that is
    missing, of the wrong shape or unexpected."""
    kind = fields.get("model_type")
    known = {family: architecture for architecture in ARCHITECTURES for family in architecture.families}
    if kind not in known:
        raise UserError(f"model_type: got {kind!r}, GGUF files can hold {', '.join(known)}")
    architecture = known[kind]
    family, config, pieces, tensors = huggingface.matched(fields, tensors)
    c = Fields(rounded({**family.write(config), "model_type": kind}))
    if CONTEXT not in family.aliases:  # GPT-2 has another name for it
        c = Fields({CONTEXT: fields.get(CONTEXT), **c})
    if not architecture.windows:
        c = _without_window(c)
    metadata, computed = architecture.write(c), architecture.tensors(c)
    shapes = {piece.tensor: piece.shape for piece in pieces}
    parts = links(architecture, shapes, architecture.sizes(c))
    again = architecture.read(Keys(architecture.name, metadata, {**parts, **computed}))
    _check_expressed(architecture.name, family.read(family.named(c)), read_config({**again, VOCAB: c[VOCAB]}))

    def values(group: list[Link]) -> np.ndarray:
        written = (link.write(np.asarray(tensors[link.theirs])) for link in group)
        return np.stack(list(written)) if group[0].index else next(written)

    weights = [Weight(name, shape(group), lambda group=group: values(group)) for name, group in parts.items()]
    weights += [Weight(name, x.shape, lambda x=x: x) for name, x in computed.items()]
    keys = {f"{architecture.name}.{key}": value for key, value in metadata.items()}
    return Model(architecture.name, c[VOCAB], keys, weights)


@dataclasses.dataclass(frozen=True, eq=False)
class Assembled:
    """A published tensor in a GGUF file, assembled each time it is converted to an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[Link]
    stored: Mapping[str, Stored]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        stored = [np.asarray(self.stored[link.name].part(link.index)) for link in self.parts]
        if len(stored) == 1 and self.parts[0].same:  # of floats, a view of the file
            values = stored[0]
        else:
            values = np.empty(self.shape, self.dtype)
            for link, part in zip(self.parts, stored, strict=True):
                link.read(part, values)
        return values if dtype is None else values.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Restored(Mapping[str, Any]):
    """The tensors of a GGUF file, by Hugging Face's names."""

    parts: Mapping[str, list[Link]]
    stored: Mapping[str, Stored]

    def __getitem__(self, name: str) -> Assembled:
        parts = self.parts[name]
        dtype = np.result_type(*(self.stored[link.name].dtype for link in parts))
        return Assembled(parts[0].their_shape, dtype, parts, self.stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def restore(metadata: Mapping[str, Any], stored: Mapping[str, Stored]) -> tuple[dict[str, Any], Restored]:
    """The fields of config.json and the tensors, by Hugging Face's names, of a GGUF file's model: the inverse of
    `describe`.

    Raises UserError for an unknown architecture, a key that may change what the model computes, and tensors that are
    missing, unexpected or of the wrong shape."""
    name = metadata.get("general.architecture")
    architecture = next((architecture for architecture in ARCHITECTURES if architecture.name == name), None)
    if architecture is None:
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise UserError(f"general.architecture: got {str(name)[:40]!r}, must be one of {known}")
    if "token_embd.weight" not in stored:
        raise UserError("tensors: missing token_embd.weight, which every model has")
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    keys = Keys(architecture.name, own, stored)
    if (layers := keys.integer("block_count")) > len(stored):
        raise UserError(f"{name}.block_count: got {layers}, which is more than the file has tensors")
    fields = Fields({**architecture.read(keys), VOCAB: stored["token_embd.weight"].shape[0]})
    keys.check_all_read()
    check(dict(fields), schema.CONFIG, "metadata")
    schema.check_sizes(fields, stored, "metadata")
    family = next(family for family in FAMILIES if family.model_type == fields["model_type"])
    pieces = huggingface.tensor_pieces(family, family.read(family.named(fields)))
    parts = links(architecture, {piece.tensor: piece.shape for piece in pieces}, architecture.sizes(fields))
    if lacking := sorted(parts.keys() - stored.keys()):
        raise UserError(f"tensors: missing {_some(lacking)}, which a {name} of this metadata needs")
    if extra := sorted(stored.keys() - parts.keys() - keys.computed):
        raise UserError(f"tensors: unexpected {_some(extra)}, which a {name} of this metadata lacks")
    by_theirs: dict[str, list[Link]] = {}
    for tensor, group in parts.items():
        if (got := stored[tensor].shape) != shape(group):
            raise UserError(f"tensors: {tensor}: got shape {got}, must be {shape(group)} by the metadata")
        for link in group:
            by_theirs.setdefault(link.theirs, []).append(link)
    return fields, Restored(by_theirs, stored)


def _some(names: list[str]) -> str:
    return ", ".join(name[:100] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


CONTEXT, VOCAB = "max_position_embeddings", "vocab_size"


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    family = next(family for family in FAMILIES if family.model_type == fields["model_type"])
    return family.read(family.named(fields))


def _without_window(c: Fields) -> Fields:
    """The fields for a context in which the sliding window makes no difference: up to its length."""
    window, used = c.get("sliding_window"), c.get("use_sliding_window", True)
    if window is None or not used:
        return c
    rest = {name: value for name, value in c.items() if name != "layer_types"}
    return Fields(rest | {CONTEXT: min(c[CONTEXT], window), "sliding_window": None, "use_sliding_window": False})


def _check_expressed(architecture: str, model: ModelConfig, again: ModelConfig) -> None:
    """Raise UserError, naming the differences, if the model read back from the metadata is another one."""
    before, after = essence(model), essence(again)
    for layer, other in zip(before["layers"].values(), after["layers"].values(), strict=True):
        ours, theirs = layer["attention"], other["attention"]
        if isinstance(ours, Attention) and isinstance(theirs, Attention) and _same_positions(ours, theirs):
            other["attention"] = dataclasses.replace(theirs, positions=ours.positions)
    if changed := differences(before, after):
        raise UserError(
            f"model: a GGUF file of architecture {architecture} cannot express it; it differs in "
            f"{'; '.join(changed[:3])}"
        )


def _same_positions(a: Attention, b: Attention) -> bool:
    """True if both rotate alike, however their configurations say it."""
    if not (isinstance(a.positions, RoPE) and isinstance(b.positions, RoPE)):
        return False
    scalings = a.positions.scaling, b.positions.scaling
    alike = np.isclose(*(scaling.amplitude for scaling in scalings), rtol=1e-6)
    f, g = (_frequencies(part, part.positions) for part in (a, b) if isinstance(part.positions, RoPE))
    same = f.shape == g.shape and np.allclose(f, g, rtol=1e-6, atol=0)
    said = ("theta", "scaling", "fraction")
    rest = [{**vars(part.positions), **dict.fromkeys(said)} for part in (a, b)]
    return rest[0] == rest[1] and bool(alike) and same


def _frequencies(part: Attention, positions: RoPE) -> np.ndarray:
    latent = isinstance(part, MultiHeadLatentAttention)
    size = part.rope_size if latent else int((part.head_size or 2) * positions.fraction)
    return positions.scaling.frequencies(positions.theta, size)
