"""How many FLOPs a device does in the matrix products of a compiled program: two for each multiply-add.

They are counted as the device runs them, so that a product which several devices make alike counts on each, what is
computed again counts again, and what loops repeat counts as often. (The compiler's own count takes a loop once.)"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from gptjax.plan import hlo


def product_flops(program: hlo.Program, parts: int = 1) -> float:
    """Of products, convolutions, and kernels that say themselves what they do (`silent_kernels` has the others).

    parts  as how many devices share out the experts of a mixture: of the rows that their products could have, and that
            the kernels speak of, each computes that part, if experts are used equally
    """
    return sum(run.times * _flops(run, parts) for run in program.runs())


def silent_kernels(jaxpr: Jaxpr) -> float:
    """FLOPs of Pallas kernels that don't say what they do: the products in their jaxpr, for every step of the grid.
    Those that a mask lets a kernel skip are not skipped here."""
    # What has no results is left over from a policy that keeps them, and is not compiled.
    return sum(_of_kernels(equation) for equation in jaxpr.eqns if equation.outvars)


def _flops(run: hlo.Run, parts: int) -> float:
    one = run.instruction
    if one.opcode == "custom-call":
        said = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.rest)
        grouped = one.name.startswith("ragged-dot") or "tgmm" in one.name  # of kernels/experts.py
        return float(said[1]) / (parts if grouped else 1) if said else 0.0
    if one.opcode == "dot":
        left = hlo.dimensions(run.shapes[0])
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        along = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * math.prod(hlo.dimensions(one.shape)) * math.prod(left[i] for i in along)
    return _convolution(run) if one.opcode == "convolution" else 0.0


def _convolution(run: hlo.Run) -> float:
    """What a TPU has for products of matrices: in a window that moves over padding too, which costs nothing."""
    one = run.instruction
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None, one
    left, right, out = (
        dict(zip(names, hlo.dimensions(shape), strict=True))
        for names, shape in zip(labels.groups(), (*run.shapes, one.shape), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or ["", ""])[1]))
    each = {name: values.split("x") for name, values in window.items()}
    total = 2.0 * right["i"] * out["f"] * out["b"]
    for i, axis in enumerate(sorted(label for label in out if label.isdigit())):

        def option(name: str, default: str, i: int = i) -> str:
            return each[name][i] if name in each else default

        stride, spread, widened = (int(option(n, "1")) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(option("pad", "0_0").split("_")[0])
        at = stride * np.arange(out[axis]) - before
        places = at[:, None] + widened * np.arange(right[axis])
        total *= np.count_nonzero((places >= 0) & (places <= (left[axis] - 1) * spread) & (places % spread == 0))
    return total


def _of_kernels(equation: Any) -> float:
    params, name = equation.params, equation.primitive.name
    if name == "pallas_call":
        if params.get("cost_estimate") is not None:
            return 0.0
        return _products(params["jaxpr"]) * math.prod(params["grid_mapping"].grid)
    if name == "cond":
        return max(silent_kernels(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(map(silent_kernels, _inner(params)))


def _products(jaxpr: Jaxpr) -> float:
    """FLOPs of the products in a kernel, of the heaviest branch of a cond."""
    total = 0.0
    for equation in jaxpr.eqns:
        params, name = equation.params, equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = (x.aval.shape for x in (equation.invars[0], equation.outvars[0]))  # pyright: ignore[reportAttributeAccessIssue]
            total += 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
        elif name == "cond":
            total += max(_products(branch.jaxpr) for branch in params["branches"])
        else:
            total += (params["length"] if name == "scan" else 1) * sum(map(_products, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
