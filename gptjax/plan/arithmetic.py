"""FLOPs per device in the matrix products of a compiled program: two for each multiply-add.

They are counted as executed: a product that is replicated counts on every device, rematerialised products count again,
and products in a loop count once per iteration. (The compiler's own count takes a loop body once.)"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from gptjax.plan import hlo


def product_flops(program: hlo.Program, expert_shards: int = 1) -> float:
    """FLOPs of matrix products, convolutions, and kernels with a cost estimate (`silent_kernels` counts the others).

    expert_shards  number of devices over which a mixture's experts are sharded. The grouped products are sized for all
                   rows; if experts are used equally, each device computes 1 / expert_shards of them
    """
    return sum(run.times * flops(run, expert_shards) for run in program.runs())


def silent_kernels(jaxpr: Jaxpr, platform: str = "tpu") -> float:
    """FLOPs of Pallas kernels whose cost is not in the program's text: their cost estimate, which TPU programs have and
    GPU programs have not, or the products in their jaxpr times the size of the grid. Of the latter, blocks that a mask
    lets the kernel skip are counted, and loops of unknown length count once. On CPU kernels are interpreted."""
    if platform == "cpu":
        return 0.0
    # An equation without results is left over from a remat policy that saves them; it is not compiled.
    return sum(_of_kernels(equation, platform) for equation in jaxpr.eqns if equation.outvars)


def flops(run: hlo.Run, expert_shards: int = 1) -> float:
    """FLOPs of one execution of an instruction; see `product_flops`."""
    instruction = run.instruction
    if instruction.target.startswith("__cudnn$fmha"):
        return _attention(run)
    if instruction.target.startswith("__cublas$"):
        return _product(run)
    if instruction.opcode == "custom-call":
        cost = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', instruction.rest)
        grouped = instruction.name.startswith("ragged-dot") or "tgmm" in instruction.name  # of kernels/experts.py
        return float(cost[1]) / (expert_shards if grouped else 1) if cost else 0.0
    if instruction.opcode == "dot":
        return _product(run)
    return _convolution(run) if instruction.opcode == "convolution" else 0.0


def _product(run: hlo.Run) -> float:
    left = hlo.dimensions(run.shapes[0])
    # A dot has {1,2} there, cuBLAS ["1","2"].
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', run.instruction.rest)
    along = re.findall(r"\d+", contracted[1]) if contracted else []
    return 2.0 * math.prod(hlo.dimensions(run.instruction.shape)) * math.prod(left[int(i)] for i in along)


def _attention(run: hlo.Run) -> float:
    """FLOPs of cuDNN's attention: two products of [T, S] and the head size forward, five backward. Blocks that a
    causal mask hides are skipped: half of them."""
    config = run.instruction.rest
    scores = re.search(r'intermediate_tensor_shape":\{"dimensions":\[([\d,"]*)\]', config)
    assert scores is not None, run.instruction
    size = math.prod(int(n) for n in re.findall(r"\d+", scores[1])) * hlo.dimensions(run.shapes[0])[-1]
    products = 5 if "Backward" in run.instruction.target else 2
    return 2.0 * products * size / (2 if '"mask_type":"CAUSAL"' in config else 1)


def _convolution(run: hlo.Run) -> float:
    """FLOPs of a convolution, which is how TPU programs express matrix products. Padding is not counted."""
    instruction = run.instruction
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None, instruction
    left, right, out = (
        dict(zip(names, hlo.dimensions(shape), strict=True))
        for names, shape in zip(labels.groups(), (*run.shapes, instruction.shape), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or ["", ""])[1]))
    each = {name: values.split("x") for name, values in window.items()}
    total = 2.0 * right["i"] * out["f"] * out["b"]
    for i, axis in enumerate(sorted(label for label in out if label.isdigit())):

        def option(name: str, default: str, i: int = i) -> str:
            return each[name][i] if name in each else default

        stride, input_dilation, kernel_dilation = (int(option(n, "1")) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        padding = int(option("pad", "0_0").split("_")[0])
        starts = stride * np.arange(out[axis]) - padding
        index = starts[:, None] + kernel_dilation * np.arange(right[axis])
        inside = (index >= 0) & (index <= (left[axis] - 1) * input_dilation) & (index % input_dilation == 0)
        total *= int(np.count_nonzero(inside))
    return total


def _of_kernels(equation: Any, platform: str) -> float:
    params, name = equation.params, equation.primitive.name
    if name == "pallas_call":
        if (cost := params.get("cost_estimate")) is not None:
            return 0.0 if platform == "tpu" else float(cost.flops)
        return _products(params["jaxpr"]) * math.prod(params["grid_mapping"].grid)
    if name == "cond":
        return max(silent_kernels(branch.jaxpr, platform) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(silent_kernels(inner, platform) for inner in _inner(params))


def _products(jaxpr: Jaxpr) -> float:
    """FLOPs of a kernel's matrix products; of a cond, its most expensive branch."""
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
