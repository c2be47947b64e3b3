"""How many FLOPs a program does, counted where it is still readable: in its jaxpr, over all devices.

The compiler's own count takes the body of a loop once, and knows nothing of kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products, two for each multiply-add: those of a scan's body as often as it runs, of the
    heaviest branch of a cond, of a kernel what it says itself, and of a `shard_map` those of every device."""
    return sum(map(_flops, jaxpr.eqns))


def _flops(equation: Any) -> float:
    params, name = equation.params, equation.primitive.name
    if name in ("dot_general", "ragged_dot_general"):
        left, right = (x.aval.shape for x in equation.invars[:2])
        if name == "ragged_dot_general":  # [M, K] [G, K, N]: every row meets one group's matrix
            return 2.0 * math.prod(left) * right[-1]
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate is not None:
            return float(estimate.flops)
        return matrix_flops(params["jaxpr"]) * math.prod(params["grid_mapping"].grid)
    if name == "cond":
        return max(matrix_flops(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(map(matrix_flops, _inner(params)))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
