"""Quantisation of a decoder's parameters by rounding.

Matrices get `bits` bits. The embeddings and the head get 8: they are read by index, or decide between close logits.
Biases, norms, routers and position embeddings are left alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed.parameters import ParamInfo, declared, flat, nested, parameter_info
from gptjax.distributed.sharding import ShardingRules, axes_of
from gptjax.kernels.quantised import BITS, QuantisedArray, quantise, rounded
from gptjax.nn import ModelConfig
from gptjax.types import Params, UserError

EMBEDDING = "embedding"
"""Name of the token embeddings."""
CODES, SCALES = "/codes", "/scales"
"""Suffixes of the names of a quantised parameter's arrays."""


def quantise_params(
    config: ModelConfig,
    params: Params,
    bits: int = 8,
    group: int | None = None,
    embeddings: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> Params:
    """Parameters with quantised matrices, each scale the largest magnitude of its group.

    bits        8 or 4
    group       inputs per scale. None, or where it does not divide their number: a scale per output
    embeddings  quantise the token embeddings and the head too, to 8 bits
    progress    called with the name of each parameter that was quantised

    Raises UserError for parameters on a mesh, or quantised already.
    """
    check(params, bits, group)
    infos, found = flat(parameter_info(config.build())), {}
    for name, x in flat(params).items():
        found[name] = quantised(name, x, infos[name], bits, group, embeddings)
        if found[name] is not x:
            progress(name)
    return nested(found)


def rounded_params(params: Params, info: Params, bits: int, group: int | None, embeddings: bool) -> Params:
    """The arrays that `quantise_params` stands for, to train a model for it, on any mesh: each matrix rounded, in the
    sharding that it has.

    info  `parameter_info` of the model; parameters that it does not have are left alone
    """
    infos, found = flat(info), dict(flat(params))
    for name in found.keys() & infos.keys():
        if (arguments := _arguments(name, infos[name], bits, group, embeddings)) is not None:
            found[name] = rounded(found[name], *arguments)
    return nested(found)


def check(params: Params, bits: int, group: int | None) -> None:
    """Raise UserError for parameters that cannot be quantised, and for another number of bits or group."""
    check_size(bits, group)
    found = flat(params)
    if any(isinstance(x, QuantisedArray) for x in found.values()):
        raise UserError("params: got quantised ones, must be floats; quantise the original model")
    if any(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in found.values()):
        raise UserError("mesh: got parameters on several devices, must be on one: load the model without a mesh")


def check_size(bits: int, group: int | None, of: str = "") -> None:
    """Raise UserError for another number of bits or group.

    of  start of the names of the options"""
    if bits not in BITS:
        raise UserError(f"{of}bits: got {bits}, must be {' or '.join(map(str, BITS))}")
    if group is not None and (group < 2 or group % 2):
        raise UserError(f"{of}group: got {group}, must be even and at least 2")


def quantised(name: str, x: Any, info: ParamInfo, bits: int, group: int | None, embeddings: bool) -> Any:
    """A parameter, rounded if it is one that is quantised."""
    arguments = _arguments(name, info, bits, group, embeddings)
    return x if arguments is None else _quantise(x, *arguments)


def _arguments(name: str, info: ParamInfo, bits: int, group: int | None, embeddings: bool) -> tuple[Any, ...] | None:
    """Arguments of `quantise` for a parameter, after its values. None: it stays as it is."""
    kind = role(name, info)
    if kind is None or (kind != "matrix" and not embeddings):
        return None
    size = (bits, group) if kind == "matrix" else (8, None)
    return *size, info.inputs, info.batch, kind == "embedding"


def role(name: str, info: ParamInfo) -> str | None:
    """Role of a parameter that is quantised: matrix, embedding or head. None: it is not."""
    if info.kind in ("matrix", "head"):
        return info.kind
    return "embedding" if name == EMBEDDING else None


def errors(config: ModelConfig, params: Params, small: Params) -> dict[str, float]:
    """Relative error |W - Q| / |W| of each quantised matrix, by name; of stacked ones with the layer's number."""
    infos, floats, found = flat(parameter_info(config.build())), flat(params), {}
    for name, q in flat(small).items():
        if not isinstance(q, QuantisedArray):
            continue
        w, rounded = (np.asarray(x, np.float32) for x in (floats[name], q))
        for index in np.ndindex(w.shape[: infos[name].batch]):
            label = "".join(f" [{i}]" for i in index)
            found[name + label] = float(
                np.linalg.norm(w[index] - rounded[index]) / max(np.linalg.norm(w[index]), 1e-30)
            )
    return found


def is_quantised(params: Params) -> bool:
    """True if any parameter is quantised."""
    return any(isinstance(x, QuantisedArray) for x in flat(params).values())


def to_arrays(params: Params) -> dict[str, Any]:
    """Name -> array; a quantised one as its `CODES` and its `SCALES`."""
    found: dict[str, Any] = {}
    for name, x in flat(params).items():
        if isinstance(x, QuantisedArray):
            found |= {name + CODES: x.codes, name + SCALES: x.scales}
        else:
            found[name] = x
    return found


def from_arrays(
    config: ModelConfig, arrays: Mapping[str, Any], rules: ShardingRules = ShardingRules()
) -> dict[str, Any]:
    """Inverse of `to_arrays`: name -> parameter, sharded over the current mesh by the rules."""
    names = [name.removesuffix(CODES) for name in arrays if name.endswith(CODES)]
    halves = {name + half for name in names for half in (CODES, SCALES)}
    found = {name: x for name, x in arrays.items() if name not in halves}
    model = config.build(rules)
    infos, whole = (flat(parameter_info(model)), declared(model)) if names else ({}, {})
    for name in names:
        if name not in infos or name + SCALES not in arrays:
            raise UserError(f"params: got {name + CODES}, must be of a matrix of this model, with {name + SCALES}")
        info = infos[name]
        _, inputs, outputs = info.split(info.shape)
        if table := role(name, info) == "embedding":
            inputs, outputs = outputs, inputs
        small = QuantisedArray(arrays[name + CODES], arrays[name + SCALES], inputs, outputs, table)
        found[name] = on_mesh(small, whole[name].sharding, info)
    return found


def on_mesh(x: QuantisedArray, sharding: NamedSharding | None, info: ParamInfo) -> QuantisedArray:
    """A quantised parameter with the sharding of the whole one. Of several input or output axes the first is sharded,
    inputs by groups, or within the only one. None: unchanged. Raises UserError for experts."""
    if sharding is None:
        return x
    if info.batch > info.stacked:
        raise UserError("mesh: got one, must be none: quantised experts are computed on one device")
    axes = [*sharding.spec, *[None] * x.ndim][: x.ndim]
    first, second = info.batch, info.batch + len(x.outputs if x.table else x.inputs)
    row, column = (axes[second], axes[first]) if x.table else (axes[first], axes[second])
    shards, groups = math.prod(sharding.mesh.shape[name] for name in axes_of(row)), x.codes.shape[-3]
    row = None if x.table else row  # a lookup reads whole rows
    by_group = row if groups > 1 and groups % shards == 0 else None
    within = row if groups == 1 and x.codes.shape[-1] % shards == 0 else None

    def put(array: Any, *own: Any) -> jax.Array:
        spec = PartitionSpec(*axes[:first], *own)
        return jax.device_put(np.asarray(array), NamedSharding(sharding.mesh, spec))

    return dataclasses.replace(x, codes=put(x.codes, by_group, column, within), scales=put(x.scales, by_group, column))


_quantise = jax.jit(quantise, static_argnums=(1, 2, 3, 4, 5))
