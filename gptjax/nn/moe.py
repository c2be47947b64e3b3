"""Mixture of experts: many feed-forward parts of which each token uses a few (Shazeer et al. 2017, arXiv:1701.06538).

y = sum_e g_e expert_e(x) + shared(x)        over the k experts e that the router chose, with its weights g
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels.experts import dispatch
from gptjax.nn.mlp import MLP, SwiGLU
from gptjax.nn.module import ParamFactory, normal, zeros
from gptjax.nn.router import Router, Softmax
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts(MLP):
    """A part like the dense ones, `mlp(param, x [B, T, D], hidden F) -> [B, T, D]`, F the hidden size of one expert.

        model = TransformerConfig(..., hidden=512, mlp=MixtureOfExperts(experts=8, top_k=2))

    Nothing is dropped unless there is a capacity. Parameters: "gate", "up" [E, D, F] and "down" [E, F, D] with their
    biases; what `shared` makes under "shared_"; the router's under "router_". On a mesh, `ShardingRules(experts=...)`
    shards the experts: each device computes those it holds, for the tokens of all devices that hold others.
    """

    experts: int = 8
    """E, the number of experts."""
    top_k: int = 2
    """How many of them a token goes to."""
    expert: MLP = SwiGLU()
    """What each expert is."""
    router: Router = Softmax()
    """Chooses the experts of each token."""
    shared: int = 0
    """How many more experts every token goes to, as one MLP that is so many times as wide (DeepSeekMoE,
    arXiv:2401.06066)."""
    capacity: float | None = None
    """Experts compute at most this many times their fair share of the tokens of a device, and drop the rest: 1.25 is
    usual. None: they compute all."""
    implementation: str | None = None
    """How `grouped_dot` computes without a capacity; none: as the device likes it."""

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"mlp.top_k: got {self.top_k}, must be 1 to mlp.experts {self.experts}")
        if self.shared < 0:
            raise UserError(f"mlp.shared: got {self.shared}, must be 0 or more")
        if self.capacity is not None and self.capacity <= 0:
            raise UserError(f"mlp.capacity: got {self.capacity}, must be positive, or None to drop nothing")
        self.router.check(self.experts, self.top_k)

    @property
    def gated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.expert.gated

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        return (("experts", "model.mlp.experts", self.experts),)

    def __call__(
        self, param: ParamFactory, x: Array, hidden: int, bias: bool = False, output_scale: float = 1.0
    ) -> Array:
        """`output_scale` multiplies the initial output weights, as in the dense parts."""
        rules, D, E = param.rules, x.shape[-1], self.experts
        held = rules.mesh_axes("experts")
        # Where the experts themselves are shared out over a mesh axis, nothing inside of them can be.
        embed = "embed" if set(held).isdisjoint(rules.mesh_axes("embed")) else None
        ffn = "ffn" if set(held).isdisjoint(rules.mesh_axes("ffn")) else None
        output = jax.nn.initializers.normal(0.02 * output_scale)
        shapes = dict.fromkeys(self._inputs, ((E, D, hidden), ("experts", embed, ffn), normal))
        shapes["down"] = (E, hidden, D), ("experts", ffn, embed), output
        if bias:
            shapes |= {f"{name}_bias": ((E, hidden), ("experts", ffn), zeros) for name in self._inputs}
            shapes["down_bias"] = (E, D), ("experts", None), zeros

        ids, gates = self.router(param.scope("router"), x, E, self.top_k)
        inputs = x, ids, gates, {name: param(name, *rest, batch=1) for name, rest in shapes.items()}
        if jax.sharding.get_abstract_mesh().empty:
            y = self._compute(*inputs)
        else:
            # Every device computes its experts, whole in width, for the tokens of all that hold other experts.
            batch, sequence = (
                tuple(name for name in rules.mesh_axes(axis) if name not in held) for axis in ("batch", "sequence")
            )
            tokens = jax.P(batch, sequence, None)
            # Where those are other rows of the batch, what comes back is each device's own rows alone.
            scattered = held if set(held) <= set(rules.mesh_axes("batch")) else ()
            own = jax.P((*batch, *scattered), sequence, None)
            whole = {name: rules(*(None if a == "embed" else a for a in axes)) for name, (_, axes, _) in shapes.items()}
            places = tokens, tokens, tokens, whole
            split = rules.mesh_axes("ffn") if ffn else ()
            compute = functools.partial(self._compute, held=held, split=split, scattered=scattered)
            names = set(jax.sharding.get_abstract_mesh().explicit_axes)
            compute = jax.shard_map(compute, in_specs=places, out_specs=own, axis_names=names, check_vma=False)
            y = compute(*map(jax.reshard, inputs, places))
            y = jax.reshard(y, rules("batch", "sequence", None))
        if self.shared:
            y = y + self.expert(param.scope("shared"), x, self.shared * hidden, bias, output_scale)
        return y

    def _compute(
        self,
        x: Array,
        ids: Array,
        gates: Array,
        params: dict[str, Array],
        held: tuple[str, ...] = (),
        split: tuple[str, ...] = (),
        scattered: tuple[str, ...] = (),
    ) -> Array:
        """sum_e g_e expert_e(x) for x [B, T, D] on one device, which has its share of the experts (they lie on the mesh
        axes `held`), and of their hidden units (on the axes `split`); of the sum, its share of the rows (on
        `scattered`, which are `held` or none)."""
        B, T, D = x.shape
        # The first choices of all tokens come before the second ones, which a capacity is to drop first.
        ids = jnp.moveaxis(ids, -1, 0).reshape(-1)
        experts = len(params["down"])
        if held:  # the device's own are 0 .. experts - 1
            ids = (ids - lax.axis_index(held) * experts) % self.experts
        capacity = None if self.capacity is None else math.ceil(self.capacity * len(ids) / self.experts)
        order = dispatch(ids, experts, capacity)

        def product(name: str, x: Array, parts: int = 1) -> Array:
            y = order.dot(x, params[name], self.implementation)
            bias = params.get(f"{name}_bias")
            return y if bias is None else y + order.of_expert(bias / parts, ids)

        # Choice by choice: a CPU takes 10 times as long for a sum along an axis of what it looks up.
        rows = order.send(jnp.concatenate([x.reshape(-1, D)] * self.top_k))
        inner = jax.checkpoint(self.expert.inner)(*(product(name, rows) for name in self._inputs))
        y = order.back(product("down", inner, lax.axis_size(split))).reshape(-1, B, T, D)
        chosen = (y[i] * gates[..., i, None] for i in range(self.top_k))
        y = functools.reduce(jnp.add, chosen).astype(x.dtype)
        if scattered:
            y = lax.psum_scatter(y, scattered, scatter_dimension=0, tiled=True)
        return lax.psum(y, split if scattered else (*held, *split))

    @property
    def _inputs(self) -> tuple[str, ...]:
        return ("gate", "up") if self.gated else ("up",)

    def matmul_params(self, width: int, hidden: int) -> int:
        """The router's, and those of the experts that a token goes to."""
        return width * self.experts + (self.top_k + self.shared) * self.expert.matmul_params(width, hidden)
