"""What the parameters of a model are called, how they lie, and which of them are matrices.

A weight is declared with the axes that it contracts before those that it brings (`kernels/linear.py`), so that how many
of either it has says which they are. Axes before them are a batch: layers, experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[..., *inputs, *outputs]: the numbers of axes that a weight contracts and brings."""

    inputs: int = 1
    outputs: int = 1
    by_fan_in: bool = False
    """Whether its initial deviation falls with the root of its inputs in every parametrisation."""

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
    "dense": Matrix(),
    "input": Matrix(1, 2, by_fan_in=True),
    "recurrent": Matrix(1, 2, by_fan_in=True),
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


def flat(params: Params) -> dict[str, Any]:
    """Name, such as "blocks/attention/q" -> array."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(flat: Mapping[str, Any]) -> Params:
    """`flat` undone."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def declared(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape, dtype and sharding (None without a mesh) of each parameter of a Flax model over tokens."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = model.clone(rules=model.rules.for_batch_size(1))  # which a mesh need not cut
    params = flat(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return params
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
        for name, x in params.items()
    }
