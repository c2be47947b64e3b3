"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): quantisation that corrects each rounding in the inputs that follow.

For a matrix with outputs w (a row of I inputs) and H = X^T X over the inputs X of a calibration text, minimise
|X w - X q|^2: with U the upper Cholesky factor of (H + damping mean(diag H))^-1, for each input i in order

    q_i = round(w_i)        w_j -= (w_i - q_i) U_ij / U_ii        for j > i

Every matrix sees inputs that the quantised matrices before it computed: one forward pass, op by op, quantises each
matrix when it is first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.distributed.parameters import ParamInfo, flat, nested, parameter_info
from gptjax.inference.quantise.weights import check, quantised, role
from gptjax.kernels.linear import PackedWeight
from gptjax.kernels.quantised import QuantisedArray, grouped, packed
from gptjax.nn import ModelConfig, unstack
from gptjax.types import Array, Params, UserError

DAMPING = 0.01
"""Fraction of the mean of the diagonal of H that is added to it."""
BLOCK = 128
"""Inputs whose corrections are applied to the rest at once."""


def gptq_params(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    bits: int = 4,
    group: int | None = None,
    embeddings: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> Params:
    """Parameters with quantised matrices, as `quantise_params`, calibrated on a text.

    tokens  int [B, T], sequences of the text: some ten thousand tokens

    Experts of a mixture, the embeddings and the head are rounded to the nearest.
    """
    check(params, bits, group)
    if tokens.ndim != 2 or not tokens.size:
        raise UserError(f"tokens: got {tokens.shape}, must be [sequences, tokens] of a calibration text")
    infos = flat(parameter_info(config.build()))
    found = {
        name: quantised(name, x, infos[name], bits, group, embeddings) if not _calibrates(name, infos[name]) else x
        for name, x in flat(params).items()
    }
    tree: Params = unstack(config, nested(found))
    done: dict[str, QuantisedArray] = {}
    # The layers have names of their own now; what they declare is the same.
    blocks = {name: infos[own] for name, own in _origins(config, found).items()}

    def wrap(name: str, x: Any) -> Any:
        info = blocks.get(name) or infos.get(name)
        if info is None or isinstance(x, PackedWeight) or not _calibrates(name, info):
            return x
        return _Calibrating(name, x, info, bits, group, done, progress)

    wrapped = nested({name: wrap(name, x) for name, x in flat(tree).items()})
    config.build().apply({"params": wrapped}, jnp.asarray(tokens, jnp.int32))
    return _restacked(config, found, done)


def _calibrates(name: str, info: ParamInfo) -> bool:
    """True for a matrix that `linear` multiplies with; experts are multiplied otherwise."""
    return role(name, info) == "matrix" and info.batch == int(info.stacked)


def _origins(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Name of a layer's own parameter -> name of the stacked parameter that has it."""
    stack, found = config.stack(), {}
    for layer in range(len(stack.blocks)):
        path, _ = stack.location(layer)
        prefix = "/".join(("blocks", *path, ""))
        for name in names:
            if name.startswith(prefix) and (path or not name.startswith(("blocks/leading_", "blocks/trailing_"))):
                found[f"blocks/layer_{layer}/{name.removeprefix(prefix)}"] = name
    return found


def _restacked(config: Any, params: dict[str, Any], done: dict[str, QuantisedArray]) -> Params:
    """Parameters with the quantised matrices, stacked as they were."""
    layers: dict[str, list[QuantisedArray]] = {}
    for name, own in _origins(config, params).items():
        if name in done:
            layers.setdefault(own, []).append(done[name])
    stacked = {own: jax.tree.map(lambda *x: jnp.stack(x), *found) for own, found in layers.items()}
    alone = {name: x for name, x in done.items() if name in params}
    infos = flat(parameter_info(config.build()))
    single = {own: x if infos[own].stacked else layers[own][0] for own, x in stacked.items()}
    return nested({**params, **single, **alone})


@dataclasses.dataclass(frozen=True, eq=False)
class _Calibrating(PackedWeight):
    """A matrix that is quantised when it is first multiplied with."""

    name: str
    w: Array
    info: ParamInfo
    bits: int
    group: int | None
    done: dict[str, QuantisedArray]
    progress: Callable[[str], None]

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(self.w.shape)

    def with_dtype(self, dtype: str) -> _Calibrating:
        return self

    def linear(self, x: Array, contract: int, out_sharding: PartitionSpec | None = None) -> Array:
        if self.name not in self.done:
            inputs = np.asarray(x, np.float32).reshape(-1, int(np.prod(self.shape[:contract])))
            self.done[self.name] = calibrated(np.asarray(self.w, np.float32), inputs, self.bits, self.group, contract)
            self.progress(self.name)
        return self.done[self.name].linear(x, contract)


def calibrated(w: np.ndarray, x: np.ndarray, bits: int, group: int | None = None, inputs: int = 1) -> QuantisedArray:
    """Quantise a matrix [*input axes, *output axes] for inputs x [M, I] as those of the calibration text."""
    rows = np.array(grouped(w, inputs)[0])  # [F, I]
    size = rows.shape[1] if group is None or rows.shape[1] % group else group
    hessian = x.T.astype(np.float64) @ x
    diagonal = np.diagonal(hessian).copy()
    hessian[np.diag_indices_from(hessian)] += np.where(diagonal > 0, DAMPING * diagonal.mean(), 1)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    top = 2 ** (bits - 1) - 1
    codes, scales = np.empty(rows.shape, np.int8), np.empty((len(rows), rows.shape[1] // size), np.float32)
    for start in range(0, rows.shape[1], BLOCK):
        end = min(start + BLOCK, rows.shape[1])
        errors = np.empty((len(rows), end - start), np.float32)
        for i in range(start, end):
            if i % size == 0:
                scales[:, i // size] = np.abs(rows[:, i : i + size]).max(1) / top
                if i + size > end:  # corrections of this block that the group's later inputs have not seen yet
                    pending = rows[:, end : i + size] - errors[:, : i - start] @ upper[start:i, end : i + size]
                    largest = np.maximum(np.abs(rows[:, i:end]).max(1), np.abs(pending).max(1))
                    scales[:, i // size] = largest / top
            scale = scales[:, i // size]
            code = np.clip(np.round(rows[:, i] / np.where(scale > 0, scale, 1)), -top - 1, top)
            codes[:, i] = code
            errors[:, i - start] = (rows[:, i] - code * scale) / upper[i, i]
            rows[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        rows[:, end:] -= errors @ upper[start:end, end:]
    steps = codes.reshape(len(rows), -1, size).swapaxes(0, 1)
    ins, outs = w.shape[:inputs], w.shape[inputs:]
    return packed(steps, scales.T, bits, ins, outs)
