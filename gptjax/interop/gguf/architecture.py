"""A model architecture of llama.cpp: the mapping between its metadata and a config.json, and a table of tensor names,
both used in both directions.

A row of the table has the published tensor's name on the left, the name in a GGUF file on the right:

    Row("model.layers.{L}.self_attn.q_proj.weight", "blk.{L}.attn_q.weight", "(N T J) D", "(N J T) D")

{L} stands for the index of a layer. Experts, {E}, are stacked along a leading axis of one tensor in a GGUF file. The
two layouts (see `interop/layout.py`) are left out if they are the same.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.interop import layout
from gptjax.interop.families import Fields
from gptjax.types import UserError

Metadata = dict[str, Any]
"""Key, without the name of the architecture -> value."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A published tensor, or a part of one, and the tensor of a GGUF file with the same numbers."""

    theirs: str
    """Hugging Face's name."""
    name: str
    """GGUF's name."""
    their_layout: str = ""
    layout: str = ""
    shift: float = 0.0
    """Added in a GGUF file: Gemma's norms multiply by 1 + scale, llama.cpp's by the scale."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp."""

    name: str
    families: tuple[str, ...]
    """`model_type` of the families that it computes."""
    table: tuple[Row, ...]
    write: Callable[[Fields], Metadata]
    """config.json -> metadata. Raises UserError, naming the field, for a setting that has no key. Settings that
    llama.cpp does not have are found by comparing with `read`."""
    read: Callable[[Keys], dict[str, Any]]
    """Metadata -> config.json."""
    sizes: Callable[[Fields], dict[str, int]] = lambda c: {}
    """Sizes of the letters in the table's layouts that are not axes of their own."""
    tensors: Callable[[Fields], dict[str, np.ndarray]] = lambda c: {}
    """Tensors of a GGUF file that a config.json determines: rotary frequencies."""
    windows: bool = False
    """True: has layers with a sliding window."""


class Keys:
    """The metadata of a model of one architecture, which records the keys that were read."""

    def __init__(self, architecture: str, metadata: Metadata, tensors: Mapping[str, Any]):
        self.architecture, self._metadata, self._tensors = architecture, metadata, tensors
        self._unread = set(metadata)
        self.computed: set[str] = set()
        """Tensors that were read here."""

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def integer(self, key: str, default: int | None = None) -> int:
        return self._get(key, default, "an integer from 0 to 2^31 - 1", _is_size)

    def number(self, key: str, default: float | None = None) -> float:
        """A float32, as the shortest decimal number that rounds to it."""
        return shortest(self._get(key, default, "a finite number", _is_number))

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, default, "true or false", lambda x: isinstance(x, bool))

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, default, "text", lambda x: isinstance(x, str))

    def has_tensor(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The float32 values of a tensor that the metadata implies."""
        self.computed.add(name)
        if name not in self._tensors:
            raise UserError(f"tensors: missing {name}, which the metadata implies")
        if (got := tuple(self._tensors[name].shape)) != shape:
            raise UserError(f"tensors: {name}: got shape {got}, must be {shape} by the metadata")
        return np.asarray(self._tensors[name], np.float32)

    def only(self, key: str, *values: object) -> None:
        """Raise UserError for a key with a value other than the supported ones."""
        self._unread.discard(key)
        if key in self._metadata and (got := self._metadata[key]) not in values:
            raise UserError(f"{self._name(key)}: got {got!r}, must be {' or '.join(map(repr, values))}")

    def check_all_read(self) -> None:
        """Raise UserError for a key that may change what the model computes."""
        for key in sorted(self._unread - WITHOUT_EFFECT):
            raise UserError(f"{self._name(key)}: got {str(self._metadata[key])[:100]}, which gptjax does not know")

    def _get(self, key: str, default: Any, kind: str, accepts: Callable[[Any], bool]) -> Any:
        self._unread.discard(key)
        value = self._metadata.get(key, default)
        if value is None:
            raise UserError(f"{self._name(key)}: got none, which a model of this architecture needs")
        if not accepts(value):
            raise UserError(f"{self._name(key)}: got {str(value)[:100]}, must be {kind}")
        return value

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"


WITHOUT_EFFECT = {"context_length", "vocab_size", "rope.scaling.finetuned"}
"""Keys that do not change what a model computes."""


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def shortest(value: float) -> float:
    """The shortest decimal number that rounds to the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rounded(value: Any) -> Any:
    """A config.json's value with all floats as a GGUF file has them."""
    if isinstance(value, float):
        return shortest(value)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Link:
    """A published tensor, or a part of one, and the part of a GGUF file's tensor with the same numbers."""

    row: Row
    theirs: str
    their_shape: tuple[int, ...]
    name: str
    index: tuple[int, ...]
    """Number of the expert, if it is one of a mixture."""
    sizes: layout.Sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part of the GGUF file's tensor."""
        return layout.shape(self.row.layout, self.sizes) if self.row.layout else self.their_shape

    def write(self, theirs: np.ndarray) -> np.ndarray:
        """The GGUF file's part, float32, of a published tensor."""
        if not self.row.layout:
            values = np.asarray(theirs, np.float32)
            return values + np.float32(self.row.shift) if self.row.shift else values
        values = np.empty(self.shape, np.float32)
        view, part = self._views(values, np.asarray(theirs))
        view[...] = part
        return values

    @property
    def same(self) -> bool:
        """True if the published tensor is the part of the GGUF file's."""
        return not (self.row.layout or self.row.shift)

    def read(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Fill the part of a published tensor that a part of a GGUF file's tensor holds."""
        if not self.row.layout:
            theirs[...] = ours - np.float32(self.row.shift)
        else:
            part, view = self._views(ours, theirs)
            view[...] = part

    def _views(self, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views of the same numbers in both tensors, with the same axes."""
        axes = " ".join(factor.letter for axis in layout.parse(self.row.layout) for factor in axis)
        pairs = ((ours, self.row.layout), (theirs, self.row.their_layout))
        first, second = (layout.view(x, pattern, axes, self.sizes) for x, pattern in pairs)
        return first, second


def links(
    architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], sizes: layout.Sizes
) -> dict[str, list[Link]]:
    """Name of a GGUF file's tensor -> what it holds, for all published tensors of a model, in the order of a GGUF
    file. Raises UserError for a tensor that has no name in a GGUF file of the architecture."""
    rows = [(re.compile(_pattern(row.theirs)), row) for row in architecture.table]
    found: dict[str, list[Link]] = {}
    for theirs, shape in shapes.items():
        matches = [(match, row) for pattern, row in rows if (match := pattern.fullmatch(theirs))]
        if not matches:
            raise UserError(f"tensors: got {theirs}, which a GGUF file of architecture {architecture.name} lacks")
        for match, row in matches:
            numbers = {letter: int(number) for letter, number in match.groupdict().items()}
            index = (numbers.pop("E"),) if "E" in numbers else ()
            name = row.name.format(**numbers)
            axes = row.their_layout.split() if "(" not in row.their_layout else _axes(row.their_layout)
            plain = {axis: size for axis, size in zip(axes, shape, strict=False) if axis.isalpha()}
            found.setdefault(name, []).append(Link(row, theirs, shape, name, index, {**plain, **sizes}))
    for name, parts in found.items():
        parts.sort(key=lambda link: link.index)
        if {link.index for link in parts} not in ({()}, {(i,) for i in range(len(parts))}):
            raise UserError(f"tensors: got experts {[link.index[0] for link in parts][:8]} of {name}, must be all")
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _axes(pattern: str) -> list[str]:
    """The axes of a layout, merged ones as "()"."""
    return re.sub(r"\([^)]*\)", "()", pattern).split()


def _pattern(name: str) -> str:
    return re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(name))


def _order(name: str) -> tuple[int, int]:
    """Outside the layers, then layer by layer."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (1, int(match[1])) if match else (0, 0)


def shape(parts: list[Link]) -> tuple[int, ...]:
    """Shape of a GGUF file's tensor."""
    return (len(parts), *parts[0].shape) if parts[0].index else parts[0].shape


def expanded(rows: Mapping[str, str], their_prefix: str = "", prefix: str = "") -> Iterator[Row]:
    """Rows of the same layout: published name -> GGUF's name, both without these prefixes."""
    for theirs, name in rows.items():
        yield Row(their_prefix + theirs, prefix + name)
