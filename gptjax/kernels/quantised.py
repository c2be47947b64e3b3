"""Quantised weights: integers of 8 or 4 bits with a scale per output and group of inputs.

    w = quantise(w, bits=8)                                 # [D, F], a scale per output
    w = quantise(w, bits=4, group=128)                      # and per 128 inputs
    y = linear(x, w)                                        # `kernels.linear` computes in integers

With groups g of inputs i, integers q and scales s:

    w_io = s_go q_io        s_go = max_i |w_io| / (2^(bits - 1) - 1)

The inputs of a product are quantised while it runs, to 8 bits with a scale per token and group, so that the products
and sums within a group are those of integers: exact, and the same in whatever order and batch. (Yao et al. 2022,
ZeroQuant, arXiv:2206.01861, section 4.1; 4 bits with 8-bit inputs: llama.cpp.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from numpy.typing import DTypeLike

from gptjax.kernels import target
from gptjax.kernels.linear import PackedWeight, linear
from gptjax.kernels.low_rank import spec
from gptjax.types import Array, UserError

BITS = (8, 4)
"""Supported sizes of an integer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedArray(PackedWeight):
    """A quantised array of G groups of K inputs, and F outputs. jax and numpy take it as its dequantised array.

    Inputs and outputs of a matrix can be several axes: they are merged here. The rows of a table of embeddings [V, D]
    are outputs, so that it is also the matrix of a tied head (`T`).
    """

    codes: Array
    """int8 [*batch, G, F, K], or of 4 bits uint8 [*batch, G, F, K / 2]: the first half of a group is in the lower four
    bits, the second in the higher ones, both plus 8."""
    scales: Array
    """float32 [*batch, G, F]."""
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Sizes of the input axes."""
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Sizes of the output axes."""
    table: bool = dataclasses.field(default=False, metadata={"static": True})
    """True: a table of embeddings, [outputs, inputs]."""
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})
    """Dtype of results."""
    rounds_inputs: bool = dataclasses.field(default=True, metadata={"static": True})
    """True: products are of integers, with the inputs rounded to 8 bits. False: products are those of the dequantised
    array, as a model is trained on it; it exists only while a product runs."""

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        batch = tuple(self.codes.shape[:-3])
        return batch + (self.outputs + self.inputs if self.table else self.inputs + self.outputs)

    @property
    def grouped(self) -> bool:
        return self.rounds_inputs

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the integers and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == jnp.int8 else 4

    @property
    def group(self) -> int:
        """K, inputs per scale."""
        return self.codes.shape[-1] * (8 // self.bits)

    @property
    def T(self) -> QuantisedArray:
        """The matrix [D, V] of a table [V, D], and back."""
        return dataclasses.replace(self, table=not self.table)

    def with_dtype(self, dtype: str) -> QuantisedArray:
        return dataclasses.replace(self, dtype=str(dtype))

    def integers(self) -> Array:
        """int8 [*batch, G, F, K]."""
        if self.bits == 8:
            return self.codes
        halves = (self.codes & 15).astype(jnp.int8), (self.codes >> 4).astype(jnp.int8)
        return jnp.concatenate(halves, -1) - jnp.int8(8)

    def dequantised(self) -> Array:
        """The array, in `dtype`."""

        def whole(w: QuantisedArray) -> Array:
            rows = w.integers().astype(jnp.float32) * w.scales[..., None]
            batch = rows.shape[:-3]
            rows = jnp.moveaxis(rows, -3, -2).reshape(*batch, *w.outputs, *w.inputs)
            if not w.table:
                first, n = len(batch), len(w.outputs)
                rows = jnp.moveaxis(rows, range(first, first + n), range(-n, 0))
            return rows.astype(w.dtype)

        return _partitioned(whole, self._whole_spec)(self)

    @property
    def _whole_spec(self) -> PartitionSpec | None:
        """PartitionSpec of the whole array. None: it is not sharded."""
        own = spec(self.codes)
        if own is None or not any(own):
            return None
        *batch, groups, column, within = own
        inputs = groups or within, *[None] * (len(self.inputs) - 1)
        outputs = column, *[None] * (len(self.outputs) - 1)
        return PartitionSpec(*batch, *(outputs + inputs if self.table else inputs + outputs))

    def __jax_array__(self) -> Array:
        return self.dequantised()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dequantised(), dtype)

    def take(self, ids: Array, out_sharding: PartitionSpec | None = None) -> Array:
        def rows(w: QuantisedArray, ids: Array) -> Array:
            w = dataclasses.replace(w, codes=w.codes[:, ids], scales=w.scales[:, ids])
            x = w.integers().astype(jnp.float32) * w.scales[..., None]
            return jnp.moveaxis(x, 0, -2).reshape(*ids.shape, *w.inputs).astype(w.dtype)

        return _partitioned(rows, out_sharding)(self, ids)

    def linear(self, x: Array, contract: int, out_sharding: PartitionSpec | None = None) -> Array:
        if not self.rounds_inputs:  # the backward pass dequantises again
            return jax.checkpoint(lambda x, w: linear(x, w.dequantised(), out_sharding, contract))(x, self)
        if x.shape[x.ndim - contract :] != self.inputs or self.table or self.codes.ndim != 3:
            raise ValueError(f"x {x.shape} does not fit a matrix {self.shape} with {self.inputs} inputs")

        def product(x: Array, w: QuantisedArray) -> Array:
            y = _product(x.reshape(-1, len(w.codes), w.group), w)
            return y.reshape(*x.shape[: x.ndim - contract], *w.outputs).astype(x.dtype)

        return _partitioned(product, out_sharding)(x, self)


@jax.custom_vjp
def _product(x: Array, w: QuantisedArray) -> Array:
    """x float [M, G, K] -> float32 [M, F]."""
    M, F = len(x), w.scales.shape[-1]
    x, x_scales = _split(x.astype(jnp.float32).swapaxes(0, 1), 8, -1)  # [G, M, K], [G, M, 1]
    x = x.astype(jnp.int8)
    cpu = target.backend() == "cpu"
    if M == 1 and cpu:  # XLA has a fast product of int8 matrices there, and none of a single row
        x = jnp.concatenate([x, x], 1)

    def of_group(x: Array, x_scales: Array, codes: Array, scales: Array) -> Array:
        return _dot(x, codes)[:M].astype(jnp.float32) * x_scales * scales

    groups = x, x_scales, w.codes, w.scales
    if len(w.codes) == 1:
        return of_group(*(a[0] for a in groups))
    if not cpu or not jax.sharding.get_abstract_mesh().empty:  # a device of a mesh has some of the groups
        return jnp.sum(jax.vmap(of_group)(*groups), 0)
    # One group at a time: on a CPU the integers of all of them take four times as long.
    return lax.scan(lambda y, group: (y + of_group(*group), None), jnp.zeros((M, F)), groups)[0]


def _dot(x: Array, codes: Array) -> Array:
    """x int8 [M, K], codes of a group [F, K] or, of 4 bits, [F, K / 2] -> int32 [M, F]."""

    def dot(x: Array, w: Array) -> Array:
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    if codes.dtype == jnp.int8:
        return dot(x, codes)
    low, high = jnp.split(x, 2, -1)
    y = dot(low, (codes & 15).astype(jnp.int8)) + dot(high, (codes >> 4).astype(jnp.int8))
    return y - 8 * jnp.sum(x, -1, keepdims=True, dtype=jnp.int32)


def _forward(x: Array, w: QuantisedArray) -> tuple[Array, tuple[Array, QuantisedArray]]:
    return _product(x, w), (x, w)


def _backward(saved: tuple[Array, QuantisedArray], g: Array) -> tuple[Array, None]:
    # Straight through the rounding of x: for what is trained below quantised weights.
    x, w = saved
    dx = jnp.einsum("MF,GFK,GF->MGK", g, w.integers().astype(jnp.float32), w.scales)
    return dx.astype(x.dtype), None


_product.defvjp(_forward, _backward)


def quantise(
    w: Array | np.ndarray, bits: int = 8, group: int | None = None, inputs: int = 1, batch: int = 0, table: bool = False
) -> QuantisedArray:
    """Quantise by rounding to the nearest integer.

    w       [*batch axes, *input axes, *output axes], or a table [V, D]
    group   inputs per scale. None, or where it does not divide their number: one scale per output
    inputs  number of input axes
    batch   number of leading axes over independent arrays
    table   w is a table of embeddings
    """
    axes = w.shape[batch:]
    ins, outs = (axes[1:], axes[:1]) if table else (axes[:inputs], axes[inputs:])
    codes, scales = _split(grouped(jnp.asarray(w, jnp.float32), len(ins), batch, table, group), bits, -1)
    return packed(codes, scales[..., 0], bits, tuple(ins), tuple(outs), table)


def rounded(
    w: Array, bits: int = 8, group: int | None = None, inputs: int = 1, batch: int = 0, table: bool = False
) -> Array:
    """`quantise(...).dequantised()` on any mesh, sharded as w: inputs on several devices may share a scale."""
    first = batch + 1 if table else batch
    ins = w.shape[first:] if table else w.shape[first : first + inputs]
    total = math.prod(ins)
    size = _group_size(total, group)
    _check_packable(bits, size)

    def round_whole(w: Array) -> Array:
        groups = w.reshape(*w.shape[:first], total // size, size, *w.shape[first + len(ins) :])
        codes, scales = _split(groups.astype(jnp.float32), bits, first + 1)
        return (codes * scales).reshape(w.shape).astype(w.dtype)

    return _partitioned(round_whole, spec(w))(w)


def _partitioned(function: Callable[..., Array], out_sharding: PartitionSpec | None) -> Callable[..., Array]:
    """The function, which the compiler divides among the devices of the current mesh. None: no mesh."""
    automatic: Any = jax.sharding.auto_axes
    return function if out_sharding is None else automatic(function, out_sharding=out_sharding)


def _split(x: Array, bits: int, axis: int) -> tuple[Array, Array]:
    """Integers, as floats, and scales whose product is nearest to x; `axis` is over the numbers of a scale."""
    scales = jnp.max(jnp.abs(x), axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return jnp.round(x / jnp.where(scales > 0, scales, 1)), scales


def grouped(w: Any, inputs: int, batch: int = 0, table: bool = False, group: int | None = None) -> Any:
    """The array as rows of groups, [*batch, G, F, K]; see `quantise`."""
    lead, axes = w.shape[:batch], w.shape[batch:]
    outs = math.prod(axes[:1] if table else axes[inputs:])
    total = math.prod(axes) // outs
    size = _group_size(total, group)
    rows = w.reshape(*lead, outs, total) if table else w.reshape(*lead, total, outs).swapaxes(-1, -2)
    return rows.reshape(*lead, outs, total // size, size).swapaxes(-3, -2)


def _group_size(total: int, group: int | None) -> int:
    """Number of inputs per scale, of `total`."""
    return total if group is None or total % group else group


def _check_packable(bits: int, size: int) -> None:
    if bits == 4 and size % 2:
        raise UserError(f"group: got {size}, must be even for 4 bits")


def packed(
    codes: Any, scales: Any, bits: int, inputs: tuple[int, ...], outputs: tuple[int, ...], table: bool = False
) -> QuantisedArray:
    """Quantised array of these integers int8 [*batch, G, F, K] and scales [*batch, G, F]. Raises UserError for a number
    of bits other than 8 and 4, and for 4 with an odd K."""
    if bits not in BITS:
        raise UserError(f"bits: got {bits}, must be {' or '.join(map(str, BITS))}")
    codes = jnp.asarray(codes, jnp.int8)
    _check_packable(bits, codes.shape[-1])
    if bits == 4:
        low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, -1)
        codes = low | high << 4
    return QuantisedArray(codes, jnp.asarray(scales, jnp.float32), inputs, outputs, table)
