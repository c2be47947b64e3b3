"""The dense layer: a product that contracts the last axes of x with the first axes of w."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.types import Array


class PackedWeight:
    """A weight that `linear` and `embed` use without an array of it. A subclass defines the products."""

    shape: tuple[int, ...]
    """As of the array: [*batch axes, *input axes, *output axes]; a table is [V, D]."""

    @property
    def grouped(self) -> bool:
        """True: `grouped_dot` takes a stack of it. False: it takes the array."""
        return True

    def with_dtype(self, dtype: str) -> Any:
        """This weight, with results in this compute dtype."""
        raise NotImplementedError

    def linear(self, x: Array, contract: int, out_sharding: PartitionSpec | None = None) -> Array:
        """x [..., *C] times this weight [*C, *O] -> [..., *O]."""
        raise NotImplementedError

    def take(self, ids: Array, out_sharding: PartitionSpec | None = None) -> Array:
        """Rows of a table: ids int [...] -> [..., D]."""
        raise NotImplementedError


def linear(x: Array, w: Array | PackedWeight, out_sharding: PartitionSpec | None = None, contract: int = 1) -> Array:
    """x [..., *C] times w [*C, *O] -> [..., *O]. contract: number of axes C."""
    if isinstance(w, PackedWeight):
        return w.linear(x, contract, out_sharding)
    if out_sharding is not None:
        dims = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
        return lax.dot_general(x, w, (dims, ((), ())), out_sharding=out_sharding)
    inner = math.prod(w.shape[:contract])
    y = _matmul(x.reshape(-1, inner), w.reshape(inner, -1))
    return y.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


# XLA's CPU backend is slow at the gradients of a product with many axes: the weight gradients alone took half of a
# training step. A product of two matrices, with the weight gradient as (g^T x)^T, is fast.
@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    return x @ w


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    rows = (((0,), (0,)), ((), ()))
    return g @ w.T, lax.dot_general(g, x, rows).T


_matmul.defvjp(_forward, _backward)
