"""Layouts of a tensor in two programs, as two patterns in the dimension letters of `types.py`:

    "(N H) D", "D N H"               rows are heads times head size; ours has three axes
    "D ([N]+K+K H)", "D N H"         columns are N + K + K heads; ours is the first N
    "(N H+[H]+H) D", "D N H"         each head has three parts; ours is the second
    "E D (F 1+[1])", "E D F"         columns alternate between two arrays; ours is the second
    "(K [G]+1+1 H) D", "D (K G) H"   G heads of each of K groups are followed by two others; ours are the K G heads

The left pattern is their layout: parentheses merge dimensions into one axis, + concatenates along it, and brackets
select a part. The right pattern is our order of axes. A pattern serves both directions because the result is a view,
`view(tensor)`, which is read from or written to. In it, merged axes of ours are separate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Sizes = Mapping[str, int]
"""Letter -> size of that axis."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A dimension of an axis: concatenated parts, of which one is selected."""

    parts: tuple[str, ...]
    picked: int

    @property
    def letter(self) -> str:
        return self.parts[self.picked]

    def size(self, sizes: Sizes) -> int:
        return sum(_size(part, sizes) for part in self.parts)

    def index(self, sizes: Sizes) -> slice | int:
        """Index of the selected part along the axis."""
        start = sum(_size(part, sizes) for part in self.parts[: self.picked])
        return start if self.letter == "1" else slice(start, start + _size(self.letter, sizes))


def parse(pattern: str) -> list[list[Factor]]:
    """The factors of each axis."""
    return [[_factor(word) for word in axis.split()] for axis in axes(pattern)]


def axes(pattern: str) -> list[str]:
    """The factors of each axis, as text."""
    return [merged or single for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", pattern)]


def sizes(pattern: str, shape: tuple[int, ...], known: Sizes | None = None) -> dict[str, int]:
    """The size of each letter, from our pattern, such as "D N H" or "D (K G) H", and an array's shape.

    known  sizes of merged letters but the last of an axis"""
    found: dict[str, int] = {}
    for axis, size in zip(axes(pattern), shape, strict=True):
        *first, last = axis.split()
        found[last] = size // math.prod((known or {})[letter] for letter in first)
    return found


def shape(pattern: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a tensor with this pattern."""
    axes = parse(pattern)
    return tuple(int(np.prod([factor.size(sizes) for factor in axis])) for axis in axes)


def view(tensor: np.ndarray, theirs: str, ours: str, sizes: Sizes) -> np.ndarray:
    """View of the part of a contiguous tensor that `theirs` selects, with axes in the order of `ours`. No copy."""
    factors = list(itertools.chain(*parse(theirs)))
    split = tensor.reshape([factor.size(sizes) for factor in factors])
    picked = split[tuple(factor.index(sizes) for factor in factors)]
    letters = [factor.letter for factor in factors if factor.letter != "1"]
    return picked.transpose([letters.index(letter) for axis in axes(ours) for letter in axis.split()])


def _factor(word: str) -> Factor:
    parts = word.split("+")
    picked = [part.startswith("[") for part in parts].index(True) if len(parts) > 1 else 0
    return Factor(tuple(part.strip("[]") for part in parts), picked)


def _size(letter: str, sizes: Sizes) -> int:
    return 1 if letter == "1" else sizes[letter]
