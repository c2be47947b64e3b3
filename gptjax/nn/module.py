"""Parts of a model: dataclasses that declare their parameters where they use them.

A part (`RMSNorm()`, `SwiGLU()`, `MultiHeadAttention(window=128)`) is a frozen dataclass and a pure function
`part(param, x, ...)`, where `param(name, shape, axes, init)` declares a parameter and returns its value. Alone it is
used like a Flax module:

    norm = RMSNorm()
    params = norm.init(key, x)
    y = norm.apply(params, x)

`module` makes a Linen module of a part, for use in other modules:

    y = RMSNorm().module(name="norm")(x)                                          # in a Linen module
    norm = nnx.bridge.ToNNX(RMSNorm().module(), rngs=nnx.Rngs(0)).lazy_init(x)    # in an NNX module
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope

from gptjax.distributed.parameters import Declared, Kind, ParamInfo
from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.linear import PackedWeight
from gptjax.types import Array, Key, Params

normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


@dataclasses.dataclass(frozen=True)
class ParamFactory:
    """Declares parameters: `param("up", (D, F), ("embed", "ffn"))`."""

    tree: Scope
    """Flax scope: a node of the parameter tree."""
    rules: ShardingRules = ShardingRules()
    """Mesh axes of the logical axes. Parts shard their activations by the same rules."""
    dtype: str = "float32"
    """Compute dtype."""
    hidden_init_scale: float = 1.0
    """Factor of the initial hidden matrices; see `parametrisation`."""
    float8: bool = False
    """In training, compute the products of matrices in 8 bits (`gptjax.kernels.float8`)."""
    prefix: str = ""
    """Prefix of the names, see `scope`."""

    @classmethod
    def for_module(
        cls,
        module: nn.Module,
        rules: ShardingRules = ShardingRules(),
        dtype: str = "float32",
        hidden_init_scale: float = 1.0,
        float8: bool = False,
    ) -> ParamFactory:
        """Factory of a Linen module, for use in its `@nn.compact` method."""
        assert module.scope is not None, "called outside of init and apply"
        return cls(module.scope, rules, dtype, hidden_init_scale, float8)

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
        """Parameter `name`: float32 of this shape, sharded by `rules(*axes)`, cast to the compute dtype.

        kind        None: "matrix" with two or more axes after the batch axes, else "other"
        inputs      number of input axes of a matrix
        batch       number of leading axes over independent arrays, such as experts
        decays      apply weight decay. None: to matrices and heads
        scale_init  apply `hidden_init_scale`. False: `init` depends on the width already

        The declaration (`ParamInfo`) is in the result of `init(..., mutable=["params", "info"])`; see `parameter_info`.
        """
        kind = kind or ("matrix" if len(shape) - batch > 1 else "other")
        info = ParamInfo(
            shape, axes, kind, inputs, batch, decays=kind in ("matrix", "head") if decays is None else decays
        )

        def draw(key: jax.Array) -> Array:
            initial = init(key, shape, jnp.float32, out_sharding=self.rules(*axes))
            return initial * self.hidden_init_scale if info.is_matrix and scale_init else initial

        if self._wanted("info"):
            self.tree.put_variable("info", self.prefix + name, Declared(info))
        stored: Any = self.tree.get_variable("params", self.prefix + name)
        packed: Any
        if isinstance(stored, PackedWeight):  # `linear` and `embed` take it as it is
            packed = stored.with_dtype(self.dtype)
            return jnp.asarray(packed) if batch and not packed.grouped else packed
        w = jnp.asarray(self.tree.param(self.prefix + name, draw), self.dtype)  # accepts numpy parameters
        if self.float8 and self.training and info.is_matrix and not batch:
            from gptjax.kernels.float8 import Float8Weight

            packed = Float8Weight(w)
            return packed
        return w

    def scope(self, name: str) -> ParamFactory:
        """Factory of a part inside a part: its "scale" becomes "{name}_scale"."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}_")

    def child(self, name: str) -> ParamFactory:
        """Factory of a child node, with parameters `{name: {...}}`."""
        return dataclasses.replace(self, tree=self.tree.push(self.prefix + name), prefix="")

    @property
    def training(self) -> bool:
        """True in a training step, which gives the rng "dropout"."""
        return self.tree.has_rng("dropout")

    @property
    def params(self) -> Mapping[str, Params]:
        """All parameters of this node."""
        return self.tree.variables()["params"]

    def declare(self, variables: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the initial parameters of this node: "params", and their `Declared` as "info"."""
        for name, tree in variables["params"].items():
            self.tree.param(name, lambda _, tree=tree: tree)
        if self._wanted("info"):
            for name, tree in variables["info"].items():
                self.tree.put_variable("info", name, tree)

    def capture(self, name: str, value: Any) -> None:
        """Return a value from `apply(..., mutable=["intermediates"])`. Otherwise does nothing."""
        if self._wanted("intermediates"):
            self.tree.put_variable("intermediates", self.prefix + name, value)

    def add_loss(self, name: str, value: Array) -> None:
        """Add a scalar to the training loss, such as a router's load balance. `apply(..., mutable=["losses"])` returns
        it beside the output. Otherwise does nothing."""
        if self._wanted("losses"):
            before = self.tree.get_variable("losses", self.prefix + name, 0.0)
            self.tree.put_variable("losses", self.prefix + name, before + value)

    def update(self, name: str, update: Callable[[], Array]) -> None:
        """Report the change of a parameter without a gradient, such as a router's balance bias. `update` is a pytree:
        training steps sum it over microbatches, call it, and add the result to the parameter.
        `apply(..., mutable=["updates"])` returns it beside the output. Otherwise does nothing."""
        if self._wanted("updates"):
            self.tree.put_variable("updates", self.prefix + name, update)

    def _wanted(self, collection: str) -> bool:
        """True if `mutable` names this collection. Flax's default for `init`, every collection, does not count."""
        return isinstance(self.tree.mutable, Collection) and collection in self.tree.mutable


class Part:
    """Base class of parts. A subclass is a frozen dataclass and defines `__call__(self, param, ...)`."""

    def __call__(self, param: ParamFactory, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def init(self, key: Key, *args: Any, method: str = "__call__", **kwargs: Any) -> Params:
        """Initial parameters, `{"params": {...}}`. The arguments are those of a call, without `param`."""
        return PartModule(self, method=method, parent=None).init(key, *args, **kwargs)

    def apply(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Output for these parameters. Accepts options of Flax's `apply`, such as `rngs` and `mutable`."""
        return PartModule(self, method=method, parent=None).apply(params, *args, **kwargs)

    def module(
        self,
        rules: ShardingRules = ShardingRules(),
        dtype: str = "float32",
        *,
        method: str = "__call__",
        name: str | None = None,
    ) -> PartModule:
        """Make a Linen module of this part.

        rules   mesh axes of the parameters' logical axes
        dtype   compute dtype; parameters are float32
        method  name of the method to call
        name    name of the submodule, in the `@nn.compact` method of another module
        """
        return PartModule(self, rules, dtype, method, name=name)


class PartModule(nn.Module):
    """Linen module of a part, made by `Part.module`."""

    part: Part
    rules: ShardingRules = ShardingRules()
    dtype: str = "float32"
    method: str = "__call__"

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        param = ParamFactory.for_module(self, self.rules, self.dtype)
        return getattr(self.part, self.method)(param, *args, **kwargs)
