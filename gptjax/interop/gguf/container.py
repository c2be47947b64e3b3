"""The container: a header, metadata as key and value, a table of tensors, then their data, each aligned; all
little-endian.

A file that is read may come from anyone: every count and length is checked against the bytes that the file has before
anything is allocated.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from gptjax.interop.gguf.encodings import BY_NUMBER, UNREADABLE, Encoding
from gptjax.types import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""Metadata that is written: bool, uint32, float32, text, or a list of texts, int32 or float32."""
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Number of a value's type -> format of `struct`."""
TEXT, LIST = 8, 9
DIMENSIONS = 4
"""Most axes of a tensor."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file, decoded each time it is converted to an array; of floats, a view."""

    shape: tuple[int, ...]
    encoding: Encoding
    data: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.encoding.dtype

    def part(self, index: tuple[int, ...]) -> Stored:
        """The entry at this index along the leading axes."""
        shape, data = self.shape, self.data
        for i in index:
            shape, data = shape[1:], data.reshape(shape[0], -1)[i]
        return Stored(shape, self.encoding, data)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        values = self.encoding.read(self.data).reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)


def header(metadata: Mapping[str, Value], tensors: Sequence[tuple[str, tuple[int, ...], Encoding]]) -> bytes:
    """All bytes before the data, for tensors (name, shape, encoding)."""
    fields = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    fields += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, shape, encoding in tensors:
        axes = shape[::-1]  # ggml lists dimensions from the innermost
        fields.append(_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, encoding.type, offset))
        size = prod(axes) // encoding.values * encoding.size
        offset += size + -size % ALIGNMENT
    return b"".join(fields)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """Encode the number of a value's type, and the value."""
    if isinstance(value, bool):  # before int: a bool is an int too
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", LIST, TEXT, len(value)) + b"".join(map(_text, value))  # type: ignore[arg-type]
    kind, letter = (6, "f") if value and isinstance(value[0], float) else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{letter}", LIST, kind, len(value), *value)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors of a file, which is memory-mapped. Raises UserError for a file that is damaged, of
    another kind, or has tensors of a type that cannot be read."""
    if path.stat().st_size < 24:
        raise _Reader(path, np.zeros(0, np.uint8)).damaged("it is shorter than a header")
    reader = _Reader(path, np.asarray(np.memmap(path, np.uint8, mode="r")))
    if reader.take(4) != MAGIC:
        raise UserError(f"path: got {path}, which is not a GGUF file")
    if (version := reader.number("<I")) not in VERSIONS:
        raise UserError(f"path: got {path}, a GGUF file of version {version}, must be 2 or 3 and little-endian")
    tensors, keys = reader.number("<Q"), reader.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(keys, least=13)):
        key = reader.text()
        if key in metadata:
            raise reader.damaged(f"the key {key[:100]!r} is there twice")
        metadata[key] = reader.value(reader.number("<I"))
    infos = [reader.tensor() for _ in range(reader.count(tensors, least=32))]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment < 1 << 20:
        raise reader.damaged(f"general.alignment is {str(alignment)[:40]}")
    start = reader.at + -reader.at % alignment
    return metadata, _stored(reader, infos, start, alignment)


@dataclasses.dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) // self.encoding.values * self.encoding.size


def _stored(reader: _Reader, infos: list[_Info], start: int, alignment: int) -> dict[str, Stored]:
    """The tensors, which must lie within the file and apart from each other."""
    found: dict[str, Stored] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        first, last = start + info.offset, start + info.offset + info.size
        if info.offset % alignment or info.offset < end or last > len(reader.data):
            raise reader.damaged(f"the data of {info.name[:100]!r} are not where the file has any, or are another's")
        if info.name in found:
            raise reader.damaged(f"the tensor {info.name[:100]!r} is there twice")
        end = info.offset + info.size
        found[info.name] = Stored(info.shape, info.encoding, reader.data[first:last])
    return found


class _Reader:
    """A cursor over a file's bytes that never leaves them."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def damaged(self, reason: str) -> UserError:
        return UserError(f"path: got {self.path}, a damaged GGUF file: {reason}; download it again")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.damaged("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, number: int, least: int) -> int:
        """A number of entries of at least that many bytes each."""
        if number > (len(self.data) - self.at) // least:
            raise self.damaged(f"it cannot hold {number} entries")
        return number

    def text(self) -> str:
        data = self.take(self.number("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise self.damaged(f"a value has the unknown type {kind}")
        inner, number = self.number("<I"), self.number("<Q")
        if inner == TEXT:
            return [self.text() for _ in range(self.count(number, least=8))]
        if inner not in SCALARS:
            raise self.damaged(f"a list has the type {inner}")
        form = SCALARS[inner]
        data = self.take(self.count(number, struct.calcsize(form)) * struct.calcsize(form))
        return np.frombuffer(data, np.dtype(form)).tolist()

    def tensor(self) -> _Info:
        name, axes = self.text(), self.number("<I")
        if not 1 <= axes <= DIMENSIONS:
            raise self.damaged(f"the tensor {name[:100]!r} has {axes} axes")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in BY_NUMBER:
            readable = ", ".join(encoding.name for encoding in BY_NUMBER.values())
            got = UNREADABLE.get(kind, f"number {kind}")
            raise UserError(f"tensors: {name[:100]}: got the type {got}, must be one of {readable}")
        encoding = BY_NUMBER[kind]
        if 0 in shape or shape[-1] % encoding.values:
            raise self.damaged(f"the tensor {name[:100]!r} has the shape {shape}, in blocks of {encoding.values}")
        return _Info(name, shape, encoding, offset)
