"""LoRA adapters beside the parameters of one model, for requests that each name theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from gptjax.distributed.parameters import flat, nested, parameter_info
from gptjax.kernels.adapted import AdaptedWeight
from gptjax.nn import LoRA, ModelConfig, unstack
from gptjax.types import Params, UserError

Adapter = tuple[LoRA, Params]
"""As `gptjax.interop.peft.read` returns it."""


def attach(config: ModelConfig, params: Params, adapters: Mapping[str, Adapter]) -> Params:
    """Unstacked parameters, in which every matrix that an adapter changes is an `AdaptedWeight`: number i + 1 is the
    i-th adapter. Ranks may differ. Raises UserError for adapters that are no sums (DoRA), or of other than matrices."""
    params = unstack(config, params)
    if not adapters:
        return params
    infos = flat(parameter_info(config.build()))
    factors = [_factors(config, name, *adapter, infos) for name, adapter in adapters.items()]
    found = flat(params)
    for name in sorted(set().union(*factors)):
        w = found[name]
        pairs = [factor.get(name) for factor in factors]
        rank = max(pair[0].shape[1] for pair in pairs if pair is not None)
        inputs, outputs = next((a.shape[0], b.shape[1]) for a, b in filter(None, pairs))
        down, up = (np.zeros((len(pairs) + 1, *shape), np.float32) for shape in ((inputs, rank), (rank, outputs)))
        for i, pair in enumerate(pairs, 1):
            if pair is not None:
                a, b = pair
                down[i, :, : a.shape[1]], up[i, : b.shape[0]] = a, b
        found[name] = AdaptedWeight(w, jnp.asarray(down), jnp.asarray(up), jnp.zeros(1, jnp.int32))
    return nested(found)


def _factors(
    config: ModelConfig, adapter: str, lora: LoRA, tree: Params, infos: Mapping
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name in the unstacked parameters -> A [C, r] and B [r, O] times its scale."""
    if type(lora) is not LoRA:
        kind = type(lora).__name__
        raise UserError(f"adapters: got {kind} in {adapter}, must be LoRA to be chosen per request; merge it")
    leaves = flat(tree)
    names = {name.rpartition("/")[0] for name in leaves}
    if unknown := names - infos.keys():
        raise UserError(f"adapters: got {', '.join(sorted(unknown))} in {adapter}, must be of this model")
    merged: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    for name, info in infos.items():
        layers, inputs, outputs = info.split(info.shape)
        if name not in names:
            merged["a"][name] = merged["b"][name] = np.zeros((*layers, 0), np.float32)
            continue
        if len(layers) > int(info.stacked):
            raise UserError(f"adapters: got {name} in {adapter}, must not be of experts")
        a, b = (np.asarray(leaves[f"{name}/{half}"], np.float32) for half in "ab")
        merged["a"][name] = a.reshape(*layers, math.prod(inputs), -1)
        merged["b"][name] = b.reshape(*layers, -1, math.prod(outputs)) * lora.scale
    a, b = (flat(unstack(config, nested(merged[half]))) for half in "ab")
    return {name: (a[name], b[name]) for name in a if np.asarray(a[name]).size}
