"""Low-rank adapters, as pure functions over a tree of parameters: LoRA and DoRA.

    lora = LoRA(rank=8, alpha=16, match=("attention/q", "attention/v"))
    info = parameter_info(model)
    adapters = lora.init(key, params, info)                   # {"blocks": {"attention": {"q": {"a": ..., "b": ...}, ...
    logits, _ = model.apply({"params": lora.merge(params, adapters)}, tokens)

Adapters train like any parameters, with an objective that merges first. The frozen parameters are an argument of the
step, and have neither gradient nor optimizer state:

    optimizer = AdamW(learning_rate=1e-4).build(steps, lora.info(info))
    step = make_step(lora.objective(objectives.NextToken()), model.apply, optimizer)
    state, metrics = step(create(adapters, optimizer, key), batch, params)

An adapter has the place of its matrix in the tree, and its sharding. Each layer of a stack has its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.parameters import ParamInfo, flat, nested
from gptjax.types import Array, Batch, Key, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class LoRA:
    """W + scale A B, with A [I, r] and B [r, O] for a matrix W [I, O] (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    A and B are multiplied once per step, not applied token by token: a step costs as much as training the matrices
    themselves, plus a copy of them, but only the adapters have optimizer state, averages and checkpoints.
    """

    rank: int = 8
    """r, the rank of the update."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    match: tuple[str, ...] = ("attention/q", "attention/v")
    """Matrices to adapt, by the last names on their paths: "q", "mlp/up", "blocks/0/mlp/up"."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank: got {self.rank}, must be at least 1")
        if not self.match:
            raise UserError('lora.match: got none, must be at least one, such as "attention/q"')

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def init(self, key: Key, params: Params, info: Params) -> Params:
        """Adapters of these parameters, float32. A is uniform in +-1/sqrt(I), as in the authors' code, and B is 0, so
        that the model's output does not change. Raises UserError if `match` matches no matrix.

        info  `parameter_info` of the model
        """
        found = self._matched(info)
        keys = jax.random.split(key, max(len(found), 1))
        leaves = flat(params)
        return nested({n: self._adapter(k, leaves[n], i) for k, (n, i) in zip(keys, found.items(), strict=True)})

    def info(self, info: Params) -> Params:
        """`ParamInfo` of the adapters, in their tree, from that of the model's parameters."""
        return nested({name: self._adapter_info(i) for name, i in self._matched(info).items()})

    def merge(self, params: Params, adapters: Params) -> Params:
        """Parameters of the adapted model, in the dtypes and shardings of `params`."""
        if not isinstance(params, Mapping):
            return self._merged(params, adapters)
        if unknown := adapters.keys() - params.keys():
            raise UserError(f"adapters: got {', '.join(sorted(unknown))}, must be of {', '.join(sorted(params))}")
        return {name: self.merge(w, adapters[name]) if name in adapters else w for name, w in params.items()}

    def objective(self, objective: Callable[..., Metrics]) -> Callable[..., Metrics]:
        """(apply, adapters, batch, key, params) -> metrics of the objective for the merged parameters. `params` are
        also the reference of an objective that has one."""
        reference = getattr(objective, "reference", False)

        def adapted(apply: Callable, adapters: Params, batch: Batch, key: Key | None, params: Params) -> Metrics:
            return objective(apply, self.merge(params, adapters), batch, key, *((params,) if reference else ()))

        return adapted

    def _matched(self, info: Params) -> dict[str, ParamInfo]:
        """Name -> information of each matrix with an adapter."""
        matrices = {name: i for name, i in flat(info).items() if i.is_matrix}
        for wanted in self.match:
            if not any(_ends(name, wanted) for name in matrices):
                there = sorted({"/".join(name.split("/")[-2:]) for name in matrices})
                raise UserError(f"lora.match: got {wanted!r}, which matches no matrix; must be of {', '.join(there)}")
        return {name: i for name, i in matrices.items() if any(_ends(name, wanted) for wanted in self.match)}

    def _adapter_info(self, info: ParamInfo) -> dict[str, ParamInfo]:
        """Information on the factors. Their kind is not "matrix": the rank does not grow with the width."""
        (layers, inputs, outputs), (layer_axes, input_axes, output_axes) = map(info.split, (info.shape, info.axes))
        factor = functools.partial(dataclasses.replace, info, kind="other", decays=True)
        return {
            "a": factor(shape=(*layers, *inputs, self.rank), axes=(*layer_axes, *input_axes, None)),
            "b": factor(shape=(*layers, self.rank, *outputs), axes=(*layer_axes, None, *output_axes)),
        }

    def _adapter(self, key: Key, w: Array, info: ParamInfo) -> dict[str, Array]:
        shapes = self._adapter_info(info)
        spec, a_spec, b_spec = _spec(w), None, None
        if spec is not None:
            layers, inputs, outputs = info.split(tuple(spec))
            a_spec, b_spec = PartitionSpec(*layers, *inputs, None), PartitionSpec(*layers, None, *outputs)
        bound = info.fan[0] ** -0.5
        return {
            "a": jax.random.uniform(key, shapes["a"].shape, jnp.float32, -bound, bound, out_sharding=a_spec),
            "b": jnp.zeros(shapes["b"].shape, jnp.float32, out_sharding=b_spec),
        }

    def _merged(self, w: Array, adapter: dict[str, Array]) -> Array:
        a, b = adapter["a"], adapter["b"]
        inputs = _input_axes(w, adapter)
        batch = tuple(range(inputs[0]))
        dims = (((a.ndim - 1,), (len(batch),)), (batch, batch))
        update = lax.dot_general(a, b, dims, out_sharding=_spec(w))
        return (w + self.scale * update).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """m (W + scale A B) / |W + scale A B|, with a norm and a learned magnitude m per output, initially the norm of W
    (Liu et al. 2024, arXiv:2402.09353, equation 5). The norm is a constant to the gradient, as in section 4.3."""

    def _adapter_info(self, info: ParamInfo) -> dict[str, ParamInfo]:
        (layers, _, outputs), (layer_axes, _, output_axes) = map(info.split, (info.shape, info.axes))
        shape, axes = (*layers, *outputs), (*layer_axes, *output_axes)
        magnitude = dataclasses.replace(info, shape=shape, axes=axes, kind="other", decays=False)
        return super()._adapter_info(info) | {"magnitude": magnitude}

    def _adapter(self, key: Key, w: Array, info: ParamInfo) -> dict[str, Array]:
        adapter = super()._adapter(key, w, info)
        inputs = _input_axes(w, adapter)
        return adapter | {"magnitude": _norm(w.astype(jnp.float32), inputs).squeeze(inputs)}

    def _merged(self, w: Array, adapter: dict[str, Array]) -> Array:
        inputs = _input_axes(w, adapter)
        direction = super()._merged(w.astype(jnp.float32), adapter)
        magnitude = jnp.expand_dims(adapter["magnitude"], inputs)
        return (direction * (magnitude / lax.stop_gradient(_norm(direction, inputs)))).astype(w.dtype)


def _ends(name: str, end: str) -> bool:
    """True if `end` is a suffix of the path: "attention/q" of "blocks/attention/q"."""
    return f"/{name}".endswith(f"/{end}")


def _input_axes(w: Array, adapter: dict[str, Array]) -> tuple[int, ...]:
    """Input axes I of w [*B, *I, *O], from its factors a [*B, *I, r] and b [*B, r, *O]."""
    a, b = adapter["a"], adapter["b"]
    return tuple(range(a.ndim + b.ndim - w.ndim - 2, a.ndim - 1))


def _norm(w: Array, inputs: tuple[int, ...]) -> Array:
    """Norm of each output's weights, [..., 1, *outputs]."""
    return jnp.sqrt(jnp.sum(jnp.square(w), inputs, keepdims=True))


def _spec(w: Array) -> PartitionSpec | None:
    """PartitionSpec of an array, with an entry for each axis. None: no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(w).sharding.spec
    return PartitionSpec(*spec, *[None] * (w.ndim - len(spec)))
