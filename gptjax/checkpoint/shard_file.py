"""File of shards of a training state: written whole or not at all, and every byte of it can be verified.

The length of the header, in 8 bytes; the header, in JSON, which describes the shards and has their SHA-256; the shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.config import digest
from gptjax.io import atomic

_LENGTH = 8
Bounds = tuple[tuple[int, int], ...]
"""First index of a shard, and the one after its last, along each axis of its array."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of an array."""

    leaf: str
    """Path of the array in the state."""
    dtype: str
    shape: tuple[int, ...]
    """Shape of the array."""
    bounds: Bounds

    @property
    def size(self) -> int:
        """Number of elements."""
        return volume(self.bounds)

    @property
    def bytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize

    def view(self, data: bytes | memoryview) -> np.ndarray:
        """The shard in its bytes."""
        return np.frombuffer(data, jnp.dtype(self.dtype)).reshape([stop - start for start, stop in self.bounds])

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Shard:
        leaf, dtype, shape, bounds = values
        return cls(leaf, dtype, tuple(shape), tuple((start, stop) for start, stop in bounds))


def volume(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


def write(path: Path, description: dict[str, Any], shards: Sequence[Shard], arrays: Sequence[np.ndarray]) -> None:
    """Write a file of shards.

    description  of JSON types"""
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
    sums = [hashlib.sha256(part).hexdigest() for part in parts]
    content = {"description": description, "shards": [dataclasses.astuple(shard) for shard in shards], "sha256": sums}
    header = json.dumps([digest(content), content]).encode()
    with atomic.new(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(_LENGTH, "little") + header)
        for part in parts:
            file.write(part)


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A file whose header is sound."""

    path: Path
    description: dict[str, Any]
    shards: list[Shard]
    sums: list[str]
    begins: list[int]
    """Position in the file of each shard, and of the end of the last one."""

    @classmethod
    def open(cls, path: Path) -> ShardFile:
        """Read the header. Raises ValueError for a damaged file."""
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH), "little")
                expected, content = json.loads(file.read(min(length, os.fstat(file.fileno()).st_size)))
            if expected != digest(content):
                raise ValueError("not as it was written")
            shards = [Shard.from_json(values) for values in content["shards"]]
            begins = list(itertools.accumulate((shard.bytes for shard in shards), initial=_LENGTH + length))
            if (size := path.stat().st_size) != begins[-1]:
                raise ValueError(f"{size} bytes instead of {begins[-1]}")
            return cls(path, content["description"], shards, content["sha256"], begins)
        except (OSError, TypeError, LookupError) as error:
            raise ValueError(str(error)) from error

    def read(self, number: int) -> bytes:
        """Bytes of a shard, not verified."""
        with self.path.open("rb") as file:
            file.seek(self.begins[number])
            return file.read(self.shards[number].bytes)

    def is_sound(self, number: int) -> bool:
        """True if a shard is as it was written."""
        try:
            return hashlib.sha256(self.read(number)).hexdigest() == self.sums[number]
        except OSError:
            return False
