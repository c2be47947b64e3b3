"""Pruning by magnitude: the smallest weights of each matrix become 0 (Han et al. 2015, arXiv:1506.02626).

    small = prune_params(config, params, fraction=0.5)      # half of each matrix
    small = prune_params(config, params, pattern=(2, 4))    # 2 of every 4 inputs stay (Mishra et al. 2021)

Embeddings, head, norms, biases and routers are left alone. To recover, train on with `optim.KeepZeros`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gptjax.distributed.parameters import ParamInfo, flat, nested, parameter_info
from gptjax.inference.quantise import is_quantised
from gptjax.nn import ModelConfig
from gptjax.types import Params, UserError


def prune_params(
    config: ModelConfig, params: Params, fraction: float | None = None, pattern: tuple[int, int] | None = None
) -> Params:
    """Parameters with pruned matrices, each layer's and each expert's for itself.

    fraction  part of each matrix that becomes 0
    pattern   (n, m): of every m neighbouring inputs of an output the n largest stay, arXiv:2104.08378. GPUs compute
              (2, 4) at twice the speed

    Raises UserError unless one of them is given, for inputs that m does not divide, and for quantised parameters.
    """
    if (fraction is None) == (pattern is None):
        raise UserError("fraction: got a fraction and a pattern, or neither; must be one of them")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"fraction: got {fraction}, must be at least 0 and less than 1")
    if pattern is not None and not 0 < pattern[0] < pattern[1]:
        raise UserError(f"pattern: got {pattern[0]}:{pattern[1]}, must be n:m with 0 < n < m")
    if is_quantised(params):
        raise UserError("params: got quantised ones, must be floats; prune first, then quantise")
    infos, found = flat(parameter_info(config.build())), flat(params)
    for name, info in infos.items():
        if info.is_matrix:
            found[name] = _prune(name, found[name], info, fraction, pattern)
    return nested(found)


def zeros(config: ModelConfig, params: Params) -> float:
    """Part of the matrices' elements that are 0."""
    infos, found = flat(parameter_info(config.build())), flat(params)
    matrices = [np.asarray(found[name]) for name, info in infos.items() if info.is_matrix]
    return sum(int((w == 0).sum()) for w in matrices) / max(sum(w.size for w in matrices), 1)


def _prune(name: str, w: Any, info: ParamInfo, fraction: float | None, pattern: tuple[int, int] | None) -> np.ndarray:
    w = np.asarray(w)
    batch, inputs, outputs = info.split(w.shape)
    rows = w.reshape(math.prod(batch), math.prod(inputs), math.prod(outputs))
    if pattern is None:
        size = np.abs(rows, dtype=np.float32).reshape(len(rows), -1)
        count = round((fraction or 0) * size.shape[1])
        smallest = np.argsort(size, axis=1, kind="stable")[:, :count]
    else:
        n, m = pattern
        if rows.shape[1] % m:
            raise UserError(f"pattern: got {n}:{m} for the {rows.shape[1]} inputs of {name}, which {m} must divide")
        # [batch * outputs * groups, m], so that the members of a group are neighbours
        groups = rows.swapaxes(1, 2).reshape(-1, m)
        smallest = np.argsort(np.abs(groups, dtype=np.float32), axis=1, kind="stable")[:, : m - n]
        kept = np.ones_like(groups, bool)
        np.put_along_axis(kept, smallest, False, axis=1)
        kept = kept.reshape(rows.shape[0], rows.shape[2], rows.shape[1]).swapaxes(1, 2)
        return np.where(kept, rows, 0).reshape(w.shape).astype(w.dtype)
    pruned = rows.reshape(len(rows), -1).copy()
    np.put_along_axis(pruned, smallest, 0, axis=1)
    return pruned.reshape(w.shape)
