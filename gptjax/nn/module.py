"""How parameters are declared: once, with their shape and their logical axes side by side.

Two kinds of thing have parameters. A `Module` is a Flax Linen module (attention, block, transformer). A *part* is a
plain frozen dataclass that goes into a configuration (`RMSNorm()`, `SwiGLU()`, `LearnedPositions(1024)`): a pure
function `part(weight, x, ...)` that asks `weight` for what it needs. `Layer` makes a Flax module of a part:

    layer = Layer(part=RMSNorm())
    params = layer.init(key, x)
    y = layer.apply(params, x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.sharding import Rules
from gptjax.types import Array


class Weight(Protocol):
    """Declares a parameter, float32 of this shape, and returns it in the compute dtype."""

    def __call__(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable[..., Array] = ...
    ) -> Array: ...


normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


class Module(nn.Module):
    """A Linen module whose parameters know their logical axes."""

    rules: Rules = Rules()
    dtype: str = "float32"

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Callable[..., Array] = normal,
    ) -> Array:
        """The parameter `name`: float32, sharded by `rules(*axes)`, cast to the compute dtype."""
        value = self.param(name, lambda key: init(key, shape, jnp.float32, out_sharding=self.rules(*axes)))
        return jnp.asarray(value, self.dtype)  # numpy parameters are welcome


class Layer(Module, kw_only=True):
    """A part with parameters of its own."""

    part: Callable[..., Any]

    @nn.compact
    def __call__(self, *args):
        return self.part(self.weight, *args)
