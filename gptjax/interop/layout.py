"""How the axes of an array lie, in the letters of `types.py`, as two patterns:

    "(N H) D", "D N H"               rows are heads times head size; ours has three axes
    "D ([N]+K+K H)", "D N H"         columns are N + K + K heads, of which this is the first N
    "(N H+[H]+H) D", "D N H"         each head has three parts, of which this is the second
    "E D (F 1+[1])", "E D F"         columns alternate between two arrays, of which this is the second

The left pattern says what the axes of a tensor are made of: parentheses hold what was merged into one axis, + joins
what was concatenated along it, and brackets pick a part. The right one gives the order in which we want the axes.
A pattern serves both directions, because what it makes is a view: `view(tensor)` is read from, or written to.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

import numpy as np

Sizes = Mapping[str, int]
"""Letter -> size of that axis."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """What an axis is made of: parts side by side, of which one is picked."""

    parts: tuple[str, ...]
    picked: int

    @property
    def letter(self) -> str:
        return self.parts[self.picked]

    def size(self, sizes: Sizes) -> int:
        return sum(_size(part, sizes) for part in self.parts)

    def index(self, sizes: Sizes) -> slice | int:
        """Where along the axis the picked part lies."""
        start = sum(_size(part, sizes) for part in self.parts[: self.picked])
        return start if self.letter == "1" else slice(start, start + _size(self.letter, sizes))


def parse(pattern: str) -> list[list[Factor]]:
    """The factors of each axis."""
    axes = re.findall(r"\(([^)]*)\)|(\S+)", pattern)
    return [[_factor(word) for word in (merged or single).split()] for merged, single in axes]


def sizes(pattern: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of each letter in an array of this shape; the pattern is a plain one, such as "D N H"."""
    return dict(zip(pattern.split(), shape, strict=True))


def shape(pattern: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a tensor of this pattern."""
    axes = parse(pattern)
    return tuple(int(np.prod([factor.size(sizes) for factor in axis])) for axis in axes)


def view(tensor: np.ndarray, theirs: str, ours: str, sizes: Sizes) -> np.ndarray:
    """The part of a contiguous tensor that the pattern picks, with its axes in our order. No copy."""
    factors = list(itertools.chain(*parse(theirs)))
    split = tensor.reshape([factor.size(sizes) for factor in factors])
    picked = split[tuple(factor.index(sizes) for factor in factors)]
    letters = [factor.letter for factor in factors if factor.letter != "1"]
    return picked.transpose([letters.index(letter) for letter in ours.split()])


def _factor(word: str) -> Factor:
    parts = word.split("+")
    picked = [part.startswith("[") for part in parts].index(True) if len(parts) > 1 else 0
    return Factor(tuple(part.strip("[]") for part in parts), picked)


def _size(letter: str, sizes: Sizes) -> int:
    return 1 if letter == "1" else sizes[letter]
