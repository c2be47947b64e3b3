"""Weights with a low-rank update: LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353).

    y = x W + scale (x A) B             LoRA
    y = y m / |W + scale A B|           DoRA: a norm and a magnitude m per output

The update is applied to x, so that the gradients of A and B need none of W. A matrix [*batch, *I, *O] has A [*batch,
*I, r] and B [*batch, r, *O]. DoRA's norm is a constant to the gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.kernels.linear import PackedWeight, linear
from gptjax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankWeight(PackedWeight):
    """A weight and its update. jax and numpy take it as the merged array."""

    base: Array | PackedWeight
    """W, an array or quantised."""
    a: Array
    b: Array
    magnitude: Array | None
    """[*batch, *O]. None: LoRA."""
    scale: float = dataclasses.field(metadata={"static": True})
    """Factor of A B."""
    dtype: str = dataclasses.field(metadata={"static": True})
    """Dtype of results."""

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(self.base.shape)

    @property
    def grouped(self) -> bool:
        return False

    def with_dtype(self, dtype: str) -> LowRankWeight:
        return dataclasses.replace(self, dtype=str(dtype))

    def linear(self, x: Array, contract: int, out_sharding: PartitionSpec | None = None) -> Array:
        base = self.base.with_dtype(self.dtype) if isinstance(self.base, PackedWeight) else self._cast(self.base)
        y, lead, inner, outer = linear(x, base, out_sharding, contract), x.ndim - contract, None, None
        if out_sharding is not None:
            axes = [*out_sharding, *[None] * y.ndim]
            inner, outer = PartitionSpec(*axes[:lead], None), PartitionSpec(*axes[lead : y.ndim])
        low = self.scale * linear(x, self._cast(self.a), inner, contract)
        y = y + linear(low, self._cast(self.b), out_sharding)
        if self.magnitude is None:
            return y
        inputs = input_axes(self.base, self.a, self.b)
        gain = self._cast(self.magnitude / lax.stop_gradient(norm(self._sum(), inputs)).squeeze(inputs))
        return y * (gain if outer is None else jax.reshard(gain, outer))

    def merged(self) -> Array:
        """The array [*batch, *I, *O], computed in float32."""
        w = self._sum()
        if self.magnitude is not None:
            axes = input_axes(self.base, self.a, self.b)
            w = w * (jnp.expand_dims(self.magnitude, axes) / lax.stop_gradient(norm(w, axes)))
        return self._cast(w)

    def __jax_array__(self) -> Array:
        return self.merged()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.merged(), dtype)

    def _sum(self) -> Array:
        """W + scale A B, float32."""
        w = jnp.asarray(self.base).astype(jnp.float32)
        batch = tuple(range(input_axes(w, self.a, self.b)[0]))
        dims = (((self.a.ndim - 1,), (len(batch),)), (batch, batch))
        return w + self.scale * lax.dot_general(self.a, self.b, dims, out_sharding=spec(w))

    def _cast(self, x: Array) -> Array:
        return jnp.asarray(x, self.dtype)


def input_axes(w: Array | PackedWeight, a: Array, b: Array) -> tuple[int, ...]:
    """Input axes I of w [*batch, *I, *O], from a [*batch, *I, r] and b [*batch, r, *O]."""
    return tuple(range(a.ndim + b.ndim - len(w.shape) - 2, a.ndim - 1))


def norm(w: Array, inputs: tuple[int, ...]) -> Array:
    """Norm of each output's weights, [..., 1, *O]."""
    return jnp.sqrt(jnp.sum(jnp.square(w), inputs, keepdims=True))


def spec(w: Array) -> PartitionSpec | None:
    """PartitionSpec of an array, with an entry for each axis. None: no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    found = jax.typeof(w).sharding.spec
    return PartitionSpec(*found, *[None] * (w.ndim - len(found)))
