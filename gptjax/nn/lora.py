"""Low-rank adapters, as pure functions over a tree of parameters: LoRA and DoRA.

    lora = LoRA(rank=8, alpha=16, match=("attention/q", "attention/v"))
    adapters = lora.init(key, params)                         # {"blocks": {"attention": {"q": {"a": ..., "b": ...}, ...
    logits, _ = model.apply({"params": lora.merge(params, adapters)}, tokens)

Training them is training any parameters, under an objective that merges first. What is frozen has no gradient and no
optimizer state; it is an argument of the step, not a part of what the step changes:

    step = make_step(lora.objective(functools.partial(objectives.NextToken(), model.apply)), optimizer)
    state, metrics = step(create(adapters, optimizer, key), batch, params)

Adapters lie where their matrix lies in the tree, sharded as it is. A layer stacked with others has its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.parameters import Matrix, by_name, matrix
from gptjax.types import Array, Batch, Key, Loss, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class LoRA:
    """W + scale A B, with A [I, r] and B [r, O] for a matrix W [I, O] (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    The product is made once for all tokens, not once for each: a step costs what it costs to train the matrices
    themselves, and a copy of them, but only the adapters have optimizer state, averages and checkpoints.
    """

    rank: int = 8
    """r, the inner size."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    match: tuple[str, ...] = ("attention/q", "attention/v")
    """The matrices that get adapters: the last names on their paths, such as "q", "mlp/up" or "blocks/0/mlp/up"."""
    rank_stabilised: bool = False
    """Whether the update is multiplied by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank: got {self.rank}, must be at least 1")
        if not self.match:
            raise UserError('lora.match: got none, must be at least one, such as "attention/q"')

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def init(self, key: Key, params: Params) -> Params:
        """The adapters of these parameters, float32. A is uniform in +-1/sqrt(I), as in the authors' code, and B is 0:
        nothing changes yet. Raises UserError where `match` names what is not there or not a matrix."""
        found = list(self._matched(params))
        keys = jax.random.split(key, max(len(found), 1))
        return _nested((names, self._adapter(k, w, m)) for k, (names, w, m) in zip(keys, found, strict=True))

    def merge(self, params: Params, adapters: Params) -> Params:
        """The parameters of the adapted model, in the dtypes and the places of those given."""
        matrices = {"/".join(names): (w, matrix) for names, w, matrix in self._matched(params)}
        merged = {path: self._merged(w, _at(adapters, path), matrix) for path, (w, matrix) in matrices.items()}
        leaves = by_name("/".join, params)
        return jax.tree.map(lambda path, w: merged.get(path, w), leaves, params)

    def objective(self, objective: Loss) -> Callable[[Params, Batch, Key | None, Params], Metrics]:
        """(adapters, batch, key, params) -> what the objective says of the merged parameters."""

        def adapted(adapters: Params, batch: Batch, key: Key | None, params: Params) -> Metrics:
            return objective(self.merge(params, adapters), batch, key)

        return adapted

    def _matched(self, params: Params) -> Iterator[tuple[list[str], Array, Matrix]]:
        """Path, weight and sides of each matrix that gets an adapter."""
        paths = jax.tree.leaves(by_name("/".join, params))
        leaves = [(path.split("/"), w) for path, w in zip(paths, jax.tree.leaves(params), strict=True)]
        for wanted in self.match:
            end = wanted.split("/")
            if not any(names[-len(end) :] == end and matrix(names) for names, _ in leaves):
                there = sorted({"/".join(names[-2:]) for names, _ in leaves if matrix(names)})
                raise UserError(f"lora.match: got {wanted!r}, which is no matrix here; must be of {', '.join(there)}")
        for names, w in leaves:
            kind = matrix(names)
            if kind and any(names[-len(end) :] == end for end in (wanted.split("/") for wanted in self.match)):
                yield names, w, kind

    def _adapter(self, key: Key, w: Array, matrix: Matrix) -> dict[str, Array]:
        batch, inputs, outputs = matrix.split(w.shape)
        bound = matrix.size(w.shape)[0] ** -0.5
        spec = _spec(w)
        a_spec, b_spec = None, None
        if spec is not None:
            layers, before, after = matrix.split(tuple(spec))
            a_spec, b_spec = PartitionSpec(*layers, *before, None), PartitionSpec(*layers, None, *after)
        a = jax.random.uniform(key, (*batch, *inputs, self.rank), jnp.float32, -bound, bound, out_sharding=a_spec)
        return {"a": a, "b": jnp.zeros((*batch, self.rank, *outputs), jnp.float32, out_sharding=b_spec)}

    def _merged(self, w: Array, adapter: dict[str, Array], matrix: Matrix) -> Array:
        batch = tuple(range(w.ndim - matrix.inputs - matrix.outputs))
        dims = (((w.ndim - matrix.outputs,), (len(batch),)), (batch, batch))
        update = lax.dot_general(adapter["a"], adapter["b"], dims, out_sharding=_spec(w))
        return (w + self.scale * update).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """m (W + scale A B) / |W + scale A B|, with a norm and a learned magnitude m for each output, which begins as the
    norm of W (Liu et al. 2024, arXiv:2402.09353, equation 5). The norm is a constant to the gradient, as in section
    4.3."""

    def _adapter(self, key: Key, w: Array, matrix: Matrix) -> dict[str, Array]:
        magnitude = _norm(w.astype(jnp.float32), matrix)
        return super()._adapter(key, w, matrix) | {"magnitude": magnitude.squeeze(_input_axes(w, matrix))}

    def _merged(self, w: Array, adapter: dict[str, Array], matrix: Matrix) -> Array:
        direction = super()._merged(w.astype(jnp.float32), adapter, matrix)
        magnitude = jnp.expand_dims(adapter["magnitude"], _input_axes(w, matrix))
        return (direction * (magnitude / lax.stop_gradient(_norm(direction, matrix)))).astype(w.dtype)


def _input_axes(w: Array, matrix: Matrix) -> tuple[int, ...]:
    return matrix.split(tuple(range(w.ndim)))[1]


def _norm(w: Array, matrix: Matrix) -> Array:
    """The length of what leads to each output, [..., 1, *outputs]."""
    return jnp.sqrt(jnp.sum(jnp.square(w), _input_axes(w, matrix), keepdims=True))


def _spec(w: Array) -> PartitionSpec | None:
    """Where the axes of an array lie, with an entry for each; None where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(w).sharding.spec
    return PartitionSpec(*spec, *[None] * (w.ndim - len(spec)))


def _at(tree: Params, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _nested(items: Iterable[tuple[list[str], Any]]) -> Params:
    tree: dict[str, Any] = {}
    for names, value in items:
        branch = tree
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
        branch[names[-1]] = value
    return tree
