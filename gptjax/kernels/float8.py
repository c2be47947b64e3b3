"""Matrix products in 8 bits for training (Micikevicius et al. 2022, arXiv:2209.05433): e4m3 for activations and
weights, e5m2 for gradients, each array with a scale of its own that maps its largest number to the largest of the
format.

    y = fake(x) fake(w)        fake(x) = s round(x / s),  s = max |x| / 448

Rounding has no gradient of its own: gradients pass it unchanged. The products are written in the compute dtype;
XLA replaces a product of rounded arrays by one of 8-bit numbers where the device has it: GPUs from compute capability
8.9. Elsewhere the numbers are the same, without the speed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.kernels.linear import PackedWeight, linear
from gptjax.types import Array

OPERAND, GRADIENT = "float8_e4m3fn", "float8_e5m2"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Weight(PackedWeight):
    """A matrix whose products are computed in 8 bits."""

    w: Array
    """[*C, *O] in the compute dtype."""

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.w.shape

    def __jax_array__(self) -> Array:
        return self.w

    def linear(self, x: Array, contract: int, out_sharding: PartitionSpec | None = None) -> Array:
        return rounded_gradient(linear(rounded(x), rounded(self.w), out_sharding, contract))


@jax.custom_vjp
def rounded(x: Array) -> Array:
    """x rounded to e4m3 with a scale of its own. The gradient is that of x."""
    return _fake(x, OPERAND)


rounded.defvjp(lambda x: (_fake(x, OPERAND), None), lambda _, g: (g,))


@jax.custom_vjp
def rounded_gradient(y: Array) -> Array:
    """y, with a gradient rounded to e5m2."""
    # XLA would make a GELU part of the product, and then fail: cuBLAS has no such product in 8 bits (jax 0.11.2).
    return lax.optimization_barrier(y)


rounded_gradient.defvjp(lambda y: (lax.optimization_barrier(y), None), lambda _, g: (_fake(g, GRADIENT),))


def _fake(x: Array, dtype: str) -> Array:
    """s round(x / s), in x's dtype."""
    largest = jnp.finfo(dtype).max.astype(jnp.float32)
    most = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.where(most > 0, most / largest, 1.0)
    small = jnp.clip(x / scale.astype(x.dtype), -largest.astype(x.dtype), largest.astype(x.dtype)).astype(dtype)
    return small.astype(x.dtype) * scale.astype(x.dtype)
