"""Low-rank adapters, as pure functions over a tree of parameters: LoRA and DoRA.

    lora = LoRA(rank=8, alpha=16)
    info = parameter_info(model)
    adapters = lora.init(key, params, info)                   # {"blocks": {"attention": {"q": {"a": ..., "b": ...}, ...
    logits, _ = model.apply({"params": lora.attach(params, adapters)}, tokens)
    params = lora.merge(params, adapters)                     # arrays again, to serve and to export

Adapters train like any parameters, with an objective that attaches them first. The frozen parameters are an argument of
the step, and have neither gradient nor optimizer state:

    optimizer = AdamW(learning_rate=1e-3).build(steps, lora.info(info))
    step = make_step(lora.objective(objectives.NextToken()), model.apply, optimizer)
    state, metrics = step(create(adapters, optimizer, key), batch, params)

An adapter has the place of its matrix in the tree, and its sharding. Each layer of a stack has its own. With `bits`
(QLoRA) `params = lora.freeze(params, info)` comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.distributed.parameters import ParamInfo, flat, nested
from gptjax.kernels.linear import PackedWeight
from gptjax.types import Array, Batch, FrozenModel, Key, Metrics, Params, UserError

if TYPE_CHECKING:
    from gptjax.kernels.low_rank import LowRankWeight
    from gptjax.kernels.quantised import QuantisedArray


@dataclasses.dataclass(frozen=True)
class LoRA:
    """W + scale A B, with A [I, r] and B [r, O] for a matrix W [I, O] (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    The update is applied to activations, x W + scale (x A) B, so that no gradient of W is computed: a step takes about
    2/3 of the FLOPs of training W. Experts' matrices are merged instead in each step, which costs as much as training
    them. Only the adapters have gradients, optimizer state, averages and checkpoints. The usual learning rate is about
    10 times that of training W ("LoRA Without Regret", Schulman et al. 2025).
    """

    rank: int = 8
    """r, the rank of the update."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    match: tuple[str, ...] | None = None
    """Matrices to adapt, by the last names on their paths: "q", "mlp/up", "blocks/0/mlp/up". None: all matrices but the
    embeddings and the head."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    bits: int | None = None
    """QLoRA: round the frozen matrices to 8 or 4 bits (Dettmers et al. 2023, arXiv:2305.14314, with integers in place
    of its NF4). The embeddings and the head stay as they are. None: no rounding."""
    group: int | None = 64
    """With `bits`: inputs per scale. None, or where it does not divide their number: a scale per output."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank: got {self.rank}, must be at least 1")
        if self.match == ():
            raise UserError('lora.match: got none, must be at least one, such as "attention/q", or None for all')
        if self.bits not in (None, 8, 4):
            raise UserError(f"lora.bits: got {self.bits}, must be 8, 4 or None")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise UserError(f"lora.group: got {self.group}, must be even and at least 2, or None")

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def freeze(self, params: Params, info: Params) -> Params:
        """Parameters to adapt: these, or with `bits` their matrices as `QuantisedArray`, whose products are those of
        the dequantised matrices, in training as after `merge`. On a mesh they are replicated, but for the layers of a
        pipeline.

        info  `parameter_info` of the model
        """
        if self.bits is None:
            return params
        infos = flat(info)
        return nested({name: self._frozen(w, infos[name]) for name, w in flat(params).items()})

    def init(self, key: Key, params: Params, info: Params) -> Params:
        """Adapters of these parameters, as `freeze` returns them, float32. A is uniform in +-1/sqrt(I), as in the
        authors' code, and B is 0, so that the model's output does not change. Raises UserError if `match` matches no
        matrix.

        info  `parameter_info` of the model
        """
        found = self._matched(info)
        keys = jax.random.split(key, max(len(found), 1))
        leaves = flat(params)
        return nested({n: self._adapter(k, leaves[n], i) for k, (n, i) in zip(keys, found.items(), strict=True)})

    def info(self, info: Params) -> Params:
        """`ParamInfo` of the adapters, in their tree, from that of the model's parameters."""
        return nested({name: self._adapter_info(i) for name, i in self._matched(info).items()})

    def attach(self, params: Params, adapters: Params) -> Params:
        """Parameters in which every adapted matrix is a `LowRankWeight`, for `Module.apply`."""
        if not isinstance(params, Mapping):
            return self._attached(params, adapters)
        if unknown := adapters.keys() - params.keys():
            raise UserError(f"adapters: got {', '.join(sorted(unknown))}, must be of {', '.join(sorted(params))}")
        return {name: self.attach(w, adapters[name]) if name in adapters else w for name, w in params.items()}

    def merge(self, params: Params, adapters: Params) -> Params:
        """Parameters of the adapted model as arrays, in the dtypes and shardings of `params`; of a quantised matrix
        the dequantised one, as it was trained on."""
        attached = self.attach(params, adapters)
        return jax.tree.map(
            lambda w: jnp.asarray(w) if isinstance(w, PackedWeight) else w,
            attached,
            is_leaf=lambda w: isinstance(w, PackedWeight),
        )

    def objective(self, objective: Callable[..., Metrics]) -> Callable[..., Metrics]:
        """(apply, adapters, batch, key, params, *models) -> metrics of the objective for the adapted model. `params`
        are also the reference of an objective that has one, `models` its other frozen models."""
        reference = getattr(objective, "reference", False)

        def adapted(
            apply: Callable, adapters: Params, batch: Batch, key: Key | None, params: Params, *models: FrozenModel
        ) -> Metrics:
            frozen = (params, *models) if reference else models
            return objective(apply, self.attach(params, adapters), batch, key, *frozen)

        return adapted

    def _matched(self, info: Params) -> dict[str, ParamInfo]:
        """Name -> information of each matrix with an adapter."""
        matrices = {name: i for name, i in flat(info).items() if i.is_matrix}
        if self.match is None:
            return matrices
        for wanted in self.match:
            if not any(_ends(name, wanted) for name in matrices):
                there = sorted({"/".join(name.split("/")[-2:]) for name in matrices})
                raise UserError(f"lora.match: got {wanted!r}, which matches no matrix; must be of {', '.join(there)}")
        return {name: i for name, i in matrices.items() if any(_ends(name, wanted) for wanted in self.match)}

    def _frozen(self, w: Array, info: ParamInfo) -> Array | QuantisedArray:
        if self.bits is None or not info.is_matrix:
            return w
        from gptjax.kernels.low_rank import spec
        from gptjax.kernels.quantised import quantise

        if (there := spec(w)) is not None:
            batch, inputs, outputs = info.split(tuple(there))
            w = jax.reshard(w, PartitionSpec(*batch, *[None] * len(inputs + outputs)))
        rounded = quantise(w, self.bits, self.group, info.inputs, info.batch)
        return dataclasses.replace(rounded, dtype=str(w.dtype), rounds_inputs=False)

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
        from gptjax.kernels.low_rank import spec

        there, a_spec, b_spec = spec(jnp.asarray(w)), None, None
        if there is not None:
            layers, inputs, outputs = info.split(tuple(there))
            a_spec, b_spec = PartitionSpec(*layers, *inputs, None), PartitionSpec(*layers, None, *outputs)
        bound = info.fan[0] ** -0.5
        return {
            "a": jax.random.uniform(key, shapes["a"].shape, jnp.float32, -bound, bound, out_sharding=a_spec),
            "b": jnp.zeros(shapes["b"].shape, jnp.float32, out_sharding=b_spec),
        }

    def _attached(self, w: Array, adapter: dict[str, Array]) -> LowRankWeight:
        from gptjax.kernels.low_rank import LowRankWeight

        return LowRankWeight(w, adapter["a"], adapter["b"], adapter.get("magnitude"), self.scale, str(w.dtype))


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
        from gptjax.kernels.low_rank import input_axes, norm

        inputs = input_axes(w, adapter["a"], adapter["b"])
        return adapter | {"magnitude": norm(jnp.asarray(w).astype(jnp.float32), inputs).squeeze(inputs)}


def _ends(name: str, end: str) -> bool:
    """True if `end` is a suffix of the path: "attention/q" of "blocks/attention/q"."""
    return f"/{name}".endswith(f"/{end}")
