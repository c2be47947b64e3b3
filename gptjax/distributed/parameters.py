"""Information on the parameters of a model, and their trees by name.

    info = parameter_info(model)                            # the tree of the parameters, a `ParamInfo` for each
    transform = Muon(learning_rate=5e-3).build(steps, info)

Optimizers, muP, LoRA and exports read it: nothing is told from the name of a parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding

from gptjax.types import Params, PyTree, UserError

Kind = Literal["matrix", "embedding", "head", "other"]
"""Role of a parameter:

matrix     hidden matrix, whose inputs and outputs grow with the width: Muon, muP and LoRA are for these
embedding  table of learned vectors, read by index: tokens, positions
head       matrix from the width to outputs whose number is fixed: vocabulary, classes
other      scales, biases and other vectors and scalars
"""


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """Declaration of a parameter, given beside its use (`nn.ParamFactory`).

    Matrices are laid out [*batch axes, *input axes, *output axes]; `kernels.linear` contracts the input axes.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axes, one per axis of the shape."""
    kind: Kind = "other"
    inputs: int = 1
    """Number of input axes of a matrix."""
    batch: int = 0
    """Number of leading axes over independent arrays: layers, experts."""
    stacked: bool = False
    """True: the first axis is over the layers of a stack."""
    decays: bool = False
    """True: weight decay applies."""

    @property
    def is_matrix(self) -> bool:
        return self.kind == "matrix"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def fan(self) -> tuple[int, int]:
        """(fan-in, fan-out) of a matrix: the products of its input and of its output axes."""
        _, inputs, outputs = self.split(self.shape)
        return math.prod(inputs), math.prod(outputs)

    def split(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """A tuple with one entry per axis as (batch, inputs, outputs)."""
        first, last = self.batch, self.batch + self.inputs
        return values[:first], values[first:last], values[last:]

    def stack(self, layers: int) -> ParamInfo:
        """This parameter of `layers` equal layers, stacked along a new first axis."""
        shape, axes = (layers, *self.shape), ("layers", *self.axes)
        return dataclasses.replace(self, shape=shape, axes=axes, batch=self.batch + 1, stacked=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Declared:
    """A `ParamInfo` as a pytree without leaves, which jax's transformations leave alone."""

    info: ParamInfo


def parameter_info(model: Any, *inputs: PyTree, **named: Any) -> Params:
    """The `ParamInfo` of each parameter of a Flax module, in the tree of its parameters. Nothing is computed.

    model   declares its parameters by `nn.ParamFactory`; UserError where one is not
    inputs  arrays, or their shapes, that its `init` takes after the key. None: those of a model over tokens
    named   other arguments of `init`, which stay as they are
    """
    key = None if inputs or named else _identity(model)
    if (known := _KNOWN.get(key)) is not None:
        return _copied(known)
    if not inputs:
        model, inputs = _for_one_token(model)
    init = functools.partial(model.init, **named, mutable=["params", "info"])
    variables = jax.eval_shape(init, _key(), *inputs)
    infos = jax.tree.map(lambda x: x.info, variables.get("info", {}), is_leaf=lambda x: isinstance(x, Declared))
    if lacking := flat(variables["params"]).keys() - flat(infos).keys():
        raise UserError(
            f"parameters: got {', '.join(sorted(lacking))} by `self.param`, must be declared by ParamFactory"
        )
    if key is not None:
        if len(_KNOWN) >= 64:
            _KNOWN.clear()
        _KNOWN[key] = _copied(infos)
    return infos


_KNOWN: dict[Any, Params] = {}
"""Identity of a model over tokens -> its information, as tracing a large one takes seconds."""


def _identity(model: Any) -> tuple[Any, Any] | None:
    """The model and the mesh that it is traced for. None: a configuration of somebody's own that has no hash."""
    try:
        hash(model)
    except TypeError:
        return None
    return model, jax.sharding.get_abstract_mesh()


def _copied(infos: Params) -> Params:
    return jax.tree.map(lambda info: info, infos, is_leaf=lambda x: isinstance(x, ParamInfo))


def _for_one_token(model: Any) -> tuple[Any, tuple[np.ndarray]]:
    """A model over tokens and tokens [1, 1] to initialise it with; a batch of 1 cannot be sharded."""
    return model.clone(rules=model.rules.for_batch_size(1)), (np.zeros((1, 1), np.int32),)


def _key() -> Any:
    """An abstract random key: under an abstract mesh there is no other."""
    return jax.eval_shape(lambda: jax.random.key(0))


def flat(params: Params) -> dict[str, Any]:
    """Name, such as "blocks/attention/q" -> array, or another object with a shape, such as a quantised array."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def declared(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape, dtype and sharding (None without a mesh) of each parameter of a Flax model over tokens. Raises
    UserError for sizes that the current mesh does not divide."""
    mesh = jax.sharding.get_mesh()
    model.rules.check_sizes(model.config.axes, dict(mesh.shape))

    def sharded(info: ParamInfo) -> NamedSharding | None:
        return None if mesh.empty else NamedSharding(mesh, model.rules(*info.axes))

    return {
        name: jax.ShapeDtypeStruct(info.shape, np.float32, sharding=sharded(info))
        for name, info in flat(parameter_info(model)).items()
    }
