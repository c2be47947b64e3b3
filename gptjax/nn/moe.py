"""Mixture of experts: each token is processed by a few of many MLPs (Shazeer et al. 2017, arXiv:1701.06538).

y = sum_e g_e expert_e(x) + shared(x)        over the router's top k experts e, with its weights g
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels.experts import dispatch
from gptjax.kernels.linear import PackedWeight
from gptjax.nn.mlp import MLP, SwiGLU
from gptjax.nn.module import ParamFactory, normal, zeros
from gptjax.nn.remat import named
from gptjax.nn.router import Router, Softmax
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts(MLP):
    """A part like a dense MLP, `mlp(param, x [B, T, D], hidden F) -> [B, T, D]`, with F the hidden size of one expert.

        model = TransformerConfig(..., hidden=512, mlp=MixtureOfExperts(experts=8, top_k=2))

    No token is dropped unless there is a `capacity`. Parameters: "gate", "up" [E, D, F] and "down" [E, F, D] with their
    biases; the shared experts' with prefix "shared_", the router's with "router_". On a mesh,
    `ShardingRules(experts=...)` shards the experts: each device computes its own, for the tokens of all devices with
    other experts.
    """

    experts: int = 8
    """E, number of experts."""
    top_k: int = 2
    """Number of experts per token."""
    expert: MLP = SwiGLU()
    """MLP of each expert."""
    router: Router = Softmax()
    """Router: chooses the experts of each token."""
    shared: int = 0
    """Number of shared experts, which process every token, computed as one wider MLP (DeepSeekMoE,
    arXiv:2401.06066)."""
    capacity: float | None = None
    """Capacity factor: in training, an expert processes at most this many times its fair share of a device's tokens,
    and drops the rest. 1.25 is usual. None, and outside of training: nothing is dropped."""
    implementation: str | None = None
    """Implementation of `grouped_dot` without a capacity. None: chosen by device."""

    routes: ClassVar[bool] = True

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
    def drops_tokens(self) -> bool:
        return self.capacity is not None

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        return (("experts", "model.mlp.experts", self.experts),)

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        hidden: int,
        bias: bool = False,
        output_scale: float = 1.0,
        mask: Array | None = None,
    ) -> Array:
        """x [B, T, D] -> [B, T, D].

        output_scale  factor of the initial output weights, as in dense MLPs
        mask          bool [B, T], False for padding, which goes to no expert. None: no padding
        """
        rules, D, E = param.rules, x.shape[-1], self.experts
        expert_axes = rules.mesh_axes("experts")
        # An array cannot be sharded twice over an axis: the experts come first.
        embed = "embed" if set(expert_axes).isdisjoint(rules.mesh_axes("embed")) else None
        ffn = "ffn" if set(expert_axes).isdisjoint(rules.mesh_axes("ffn")) else None
        output = jax.nn.initializers.normal(0.02 * output_scale)
        shapes = dict.fromkeys(self._inputs, ((E, D, hidden), ("experts", embed, ffn), normal))
        shapes["down"] = (E, hidden, D), ("experts", ffn, embed), output
        if bias:
            shapes |= {f"{name}_bias": ((E, hidden), ("experts", ffn), zeros) for name in self._inputs}
            shapes["down_bias"] = (E, D), ("experts", None), zeros

        ids, gates = self.router(param.scope("router"), x, E, self.top_k, mask)
        ids = ids if mask is None else jnp.where(mask[..., None], ids, E)
        inputs = x, ids, gates, {name: param(name, *rest, batch=1) for name, rest in shapes.items()}
        compute = functools.partial(self._compute, capacity=self.capacity if param.training else None)
        if jax.sharding.get_abstract_mesh().empty:
            y = compute(*inputs)
        else:
            # Each device computes its experts, in full width, for the tokens of all devices with other experts.
            batch, sequence = (
                tuple(name for name in rules.mesh_axes(axis) if name not in expert_axes)
                for axis in ("batch", "sequence")
            )
            tokens = jax.P(batch, sequence, None)
            # If those shard the batch, each device gets the results of its own sequences only.
            scatter_axes = expert_axes if set(expert_axes) <= set(rules.mesh_axes("batch")) else ()
            out_spec = jax.P((*batch, *scatter_axes), sequence, None)
            # Gathered inside, so that their gradients are reduce-scattered; weights of few bits before.
            gathered = {
                name: axes.index("embed")
                for name, (_, axes, _) in shapes.items()
                if "embed" in axes and rules.mesh_axes("embed") and not isinstance(inputs[3][name], PackedWeight)
            }
            param_specs = {
                name: rules(*(None if a == "embed" and name not in gathered else a for a in axes))
                for name, (_, axes, _) in shapes.items()
            }
            specs = tokens, tokens, tokens, param_specs
            ffn_axes = rules.mesh_axes("ffn") if ffn else ()
            axes_of = {"expert_axes": expert_axes, "ffn_axes": ffn_axes, "scatter_axes": scatter_axes}
            compute = functools.partial(compute, **axes_of, embed_axes=rules.mesh_axes("embed"), gathered=gathered)
            names = set(jax.sharding.get_abstract_mesh().explicit_axes)
            compute = jax.shard_map(compute, in_specs=specs, out_specs=out_spec, axis_names=names, check_vma=False)
            y = compute(*map(jax.reshard, inputs, specs))
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
        capacity: float | None = None,
        expert_axes: tuple[str, ...] = (),
        ffn_axes: tuple[str, ...] = (),
        scatter_axes: tuple[str, ...] = (),
        embed_axes: tuple[str, ...] = (),
        gathered: Mapping[str, int] | None = None,
    ) -> Array:
        """sum_e g_e expert_e(x) for x [B, T, D] on one device, with its shard of the experts (over mesh axes
        `expert_axes`) and of their hidden units (over `ffn_axes`). The result is sharded by sequence over
        `scatter_axes`. Parameters in `gathered` are sharded over `embed_axes` along that axis."""
        for name, axis in (gathered or {}).items():
            params = params | {name: lax.all_gather(params[name], embed_axes, axis=axis, tiled=True)}
        B, T, D = x.shape
        # Sort by choice first: a capacity drops second choices before first ones.
        ids = jnp.moveaxis(ids, -1, 0).reshape(-1)
        experts, assigned = params["down"].shape[0], jnp.sum(ids < self.experts)
        if expert_axes:  # renumber, so that the device's own experts are 0 .. experts - 1
            own = (ids - lax.axis_index(expert_axes) * experts) % self.experts
            ids = jnp.where(ids < self.experts, own, self.experts)
        if capacity is None:
            order = dispatch(ids, experts)
        else:
            fair = jnp.ceil(capacity * assigned / self.experts).astype(jnp.int32)
            order = dispatch(ids, experts, math.ceil(capacity * len(ids) / self.experts), fair)

        def product(name: str, x: Array, parts: int = 1) -> Array:
            y = order.dot(x, params[name], self.implementation)
            bias = params.get(f"{name}_bias")
            return y if bias is None else y + order.per_row(bias / parts, ids)

        # One choice at a time: on CPU a sum along an axis of gathered rows takes 10 times as long.
        rows = order.permute(jnp.concatenate([x.reshape(-1, D)] * self.top_k))
        inner = jax.checkpoint(self.expert.inner)(*(named(product(n, rows), f"mlp_{n}") for n in self._inputs))
        y = order.unpermute(product("down", named(inner, "mlp_hidden"), lax.axis_size(ffn_axes))).reshape(-1, B, T, D)
        chosen = (y[i] * gates[..., i, None] for i in range(self.top_k))
        y = functools.reduce(jnp.add, chosen).astype(x.dtype)
        if scatter_axes:
            y = lax.psum_scatter(y, scatter_axes, scatter_dimension=0, tiled=True)
        return lax.psum(y, ffn_axes if scatter_axes else (*expert_axes, *ffn_axes))

    @property
    def _inputs(self) -> tuple[str, ...]:
        return ("gate", "up") if self.gated else ("up",)

    def matmul_params(self, width: int, hidden: int) -> int:
        """Multiplications per token: the router's, and those of the token's experts."""
        return width * self.experts + (self.top_k + self.shared) * self.expert.matmul_params(width, hidden)
