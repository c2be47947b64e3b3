"""What the parameters of a model are called, and which of them are matrices.

A weight is declared with the axes that it contracts before those that it brings (`kernels/linear.py`), so that how many
of either it has says which they are. Axes before them are a batch: layers, experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[..., *inputs, *outputs]: the numbers of axes that a weight contracts and brings."""

    inputs: int = 1
    outputs: int = 1

    def split(self, shape: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """A shape, or anything else with an entry for each axis, cut into batch, inputs and outputs."""
        start, middle = len(shape) - self.inputs - self.outputs, len(shape) - self.outputs
        return shape[:start], shape[start:middle], shape[middle:]

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """[I, O] once the axes of either side are merged."""
        _, inputs, outputs = self.split(shape)
        return math.prod(inputs), math.prod(outputs)


MATRICES = {
    "q": Matrix(1, 2),
    "k": Matrix(1, 2),
    "v": Matrix(1, 2),
    "o": Matrix(2, 1),
    "up": Matrix(),
    "gate": Matrix(),
    "down": Matrix(),
    "latent": Matrix(),
    "rope": Matrix(),
}
"""The hidden matrices, which read and write what is as wide as the model, by the last word of their name."""


def matrix(names: list[str]) -> Matrix | None:
    """The kind of matrix that the parameter with these names on its path is ("shared_up" is an "up"), if it is one."""
    return MATRICES.get(names[-1].rpartition("_")[2])


def by_name(of: Callable[[list[str]], Any], params: Params) -> Params:
    """The tree of `of(names on the path)` for each parameter."""

    def leaf(path, _):
        return of(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))

    return jax.tree_util.tree_map_with_path(leaf, params)
