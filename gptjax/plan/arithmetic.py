"""How many FLOPs a program does, counted where it is still readable: in its jaxpr, over all devices.

The compiler's own count takes the body of a loop once, and knows nothing of kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: Jaxpr, shared: Mapping[int, int] = {}) -> float:
    """FLOPs of the matrix products, two for each multiply-add: those of a scan's body as often as it runs, of the
    heaviest branch of a cond, of a kernel what it says itself, and of a `shard_map` those of every device.

    shared  in a `shard_map`, the leading size of what a device has of stacked matrices -> how many devices share them
            out: a row of a ragged product meets the matrix of its group on one of them
    """
    return sum(_flops(equation, shared) for equation in jaxpr.eqns)


def _flops(equation: Any, shared: Mapping[int, int]) -> float:
    params, name = equation.params, equation.primitive.name
    if name in ("dot_general", "ragged_dot_general"):
        left, right = (x.aval.shape for x in equation.invars[:2])
        if name == "ragged_dot_general":  # [M, K] [G, K, N] or [M, K] [M, N]: every row meets one group's matrix
            groups = equation.invars[2].aval.shape[0]
            return 2.0 * math.prod(left) * right[-1] / shared.get(groups, 1)
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate is not None:
            return float(estimate.flops)
        return matrix_flops(params["jaxpr"], shared) * math.prod(params["grid_mapping"].grid)
    if name == "cond":
        return max(matrix_flops(branch.jaxpr, shared) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        sizes = params["mesh"].shape
        times = math.prod(sizes[axis] for axis in params["newly_manual_axes"])
        stacks = [
            (x.aval.shape[0], math.prod(sizes[axis] for axis in jax.tree.leaves(spec[0])))
            for spec, x in zip(params["in_specs"], equation.invars, strict=True)
            if len(spec) == x.aval.ndim == 3
        ]
        shared = {size // parts: parts for size, parts in stacks}
    return times * sum(matrix_flops(jaxpr, shared) for jaxpr in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
