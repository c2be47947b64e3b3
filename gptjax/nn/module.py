"""How parameters are declared: once, with their shape and their logical axes side by side.

What goes into a configuration (`RMSNorm()`, `SwiGLU()`, `MultiHeadAttention(window=128)`) is a *part*: a plain frozen
dataclass, called as a pure function `part(param, x, ...)`, that asks `param` for the parameters it needs. `Layer`
makes a Flax module of a part, to use it alone:

    layer = Layer(part=RMSNorm())
    params = layer.init(key, x)
    y = layer.apply(params, x)

The modules that put parts together (`Block`, `Stack`, `Transformer`) make their own `ParamFactory` in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.distributed.parameters import Declared, Kind, ParamInfo
from gptjax.distributed.sharding import ShardingRules
from gptjax.types import Array

normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


@dataclasses.dataclass(frozen=True)
class ParamFactory:
    """Declares the parameters of a Flax module: `param("up", (D, F), ("embed", "ffn"))`."""

    module: nn.Module
    rules: ShardingRules = ShardingRules()
    """Mesh axes of the logical axes; parts shard their activations by the same rules."""
    dtype: str = "float32"
    """Compute dtype."""
    matrix_scale: float = 1.0
    """Multiplies the initial hidden matrices; see `parametrisation`."""
    prefix: str = ""

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Callable[..., Array] = normal,
        *,
        kind: Kind | None = None,
        inputs: int = 1,
        batch: int = 0,
        decays: bool | None = None,
        scale_init: bool = True,
    ) -> Array:
        """The parameter `name`: float32 of this shape, sharded by `rules(*axes)`, cast to the compute dtype.

        kind        None: "matrix" with two or more axes after the batch axes, else "other"
        inputs      number of input axes of a matrix
        batch       number of leading axes over independent arrays, such as experts
        decays      whether weight decay applies. None: to matrices and heads
        scale_init  False where `init` depends on the width already: `matrix_scale` does not apply

        The declaration (`ParamInfo`) is in what `init(..., mutable=["params", "info"])` returns; see `parameter_info`.
        """
        kind = kind or ("matrix" if len(shape) - batch > 1 else "other")
        info = ParamInfo(
            shape, axes, kind, inputs, batch, decays=kind in ("matrix", "head") if decays is None else decays
        )

        def draw(key: jax.Array) -> Array:
            initial = init(key, shape, jnp.float32, out_sharding=self.rules(*axes))
            return initial * self.matrix_scale if info.is_matrix and scale_init else initial

        if wants(self.module, "info"):
            self.module.put_variable("info", self.prefix + name, Declared(info))
        return jnp.asarray(self.module.param(self.prefix + name, draw), self.dtype)  # numpy parameters are welcome

    def scope(self, name: str) -> ParamFactory:
        """For a part inside a part: its "scale" becomes "{name}_scale"."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}_")

    def capture(self, name: str, value: Array) -> None:
        """Show a value to whoever asks for it by `apply(..., mutable=["kept"])`; it is nowhere when nobody does."""
        if not self.module.is_initializing():
            zero = functools.partial(jnp.zeros, ())
            self.module.sow("kept", self.prefix + name, value, reduce_fn=lambda _, new: new, init_fn=zero)

    def add_loss(self, name: str, value: Array) -> None:
        """Add a scalar to the training loss, as a router's balance: it is in what `apply(..., mutable=["losses"])`
        returns beside the output, and nowhere when nobody asks."""
        if not self.module.is_initializing():
            zero = functools.partial(jnp.zeros, ())
            self.module.sow("losses", self.prefix + name, value, reduce_fn=jnp.add, init_fn=zero)


def wants(module: nn.Module, collection: str) -> bool:
    """True if `mutable` names this collection. Flax's default for `init`, every collection, does not count."""
    mutable = None if module.scope is None else module.scope.mutable
    return isinstance(mutable, Collection) and collection in mutable


class Layer(nn.Module):
    """A part with parameters of its own. `init` and `apply` take what the part takes after `param`."""

    part: Callable[..., Any]
    rules: ShardingRules = ShardingRules()
    dtype: str = "float32"
    matrix_scale: float = 1.0

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(ParamFactory(self, self.rules, self.dtype, self.matrix_scale), *args, **kwargs)
