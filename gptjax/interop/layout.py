"""Layouts of a tensor in two programs, as two patterns in the dimension letters of `types.py`:

    "(N H) D", "D N H"               rows are heads times head size; ours has three axes
    "D ([N]+K+K H)", "D N H"         columns are N + K + K heads; ours is the first N
    "(N H+[H]+H) D", "D N H"         each head has three parts; ours is the second
    "E D (F 1+[1])", "E D F"         columns alternate between two arrays; ours is the second

The left pattern is their layout: parentheses merge dimensions into one axis, + concatenates along it, and brackets
select a part. The right pattern is our order of axes. A pattern serves both directions because the result is a view:
`view(tensor)` is read from or written to.
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
    axes = re.findall(r"\(([^)]*)\)|(\S+)", pattern)
    return [[_factor(word) for word in (merged or single).split()] for merged, single in axes]


def sizes(pattern: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of each letter, from a plain pattern such as "D N H" and an array's shape."""
    return dict(zip(pattern.split(), shape, strict=True))


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
    return picked.transpose([letters.index(letter) for letter in ours.split()])


def _factor(word: str) -> Factor:
    parts = word.split("+")
    picked = [part.startswith("[") for part in parts].index(True) if len(parts) > 1 else 0
    return Factor(tuple(part.strip("[]") for part in parts), picked)


def _size(letter: str, sizes: Sizes) -> int:
    return 1 if letter == "1" else sizes[letter]
