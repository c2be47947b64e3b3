"""Routers of a mixture of experts, as parts (see `module.py`): experts of each token, and their weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels.linear import linear
from gptjax.nn.module import ParamFactory, Part, zeros
from gptjax.types import Array, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BalanceUpdate:
    """Update of a balance bias without a gradient, `rate sign(mean load - load)`. Its loads are summed over
    microbatches."""

    excess: Array
    """float32 [..., E]: number of assignments to each expert minus the mean."""
    rate: float = dataclasses.field(metadata={"static": True})

    def __call__(self) -> Array:
        return -self.rate * jnp.sign(self.excess)


@dataclasses.dataclass(frozen=True)
class Router(Part):
    """A part `router(param, x [B, T, D], experts E, top_k k) -> (ids int32 [B, T, k], gates float32 [B, T, k])`.

        logits = W x + bias                                score = softmax or sigmoid of the logits
        ids = the top k of score + balance bias            gates = scale score_ids / sum score_ids

    in float32. A subclass defines the scores. Experts are balanced by a loss, by a bias that affects the selection
    only, or by both:

        load_e = share of the assignments to expert e        P_e = mean over tokens of score_e / sum score
        load balance = E sum_e load_e P_e, which is 1 when balanced       (Switch Transformers, arXiv:2101.03961, eq. 4)
        z = mean over tokens of (log sum_e exp logit_e)^2                 (ST-MoE, arXiv:2202.08906, eq. 5)
        balance bias_e += rate sign(mean load - load_e)                   (Wang et al. 2024, arXiv:2408.15664)
    """

    renormalise: bool = True
    """Normalise the weights of the selected experts to a sum of 1, as in Mixtral. False: not, as in OLMoE."""
    scale: float = 1.0
    """Factor of the weights."""
    bias: bool = False
    """Learned bias of the logits, as in gpt-oss."""
    groups: int = 1
    """Number of expert groups. A token's experts are in its best `top_groups` groups: those with the highest sum of
    their two best scores (DeepSeek-V3)."""
    top_groups: int = 1
    """Number of groups per token."""
    load_balance: float = 0.0
    """Weight of the load-balance loss in the training loss. 0.01 is usual."""
    z_loss: float = 0.0
    """Weight of the z-loss, which keeps logits small. 0.001 is usual."""
    balance_bias: bool = False
    """Balance bias, updated by the loads of the experts."""
    balance_rate: float = 1e-3
    """Change of the balance bias per step."""

    def scores(self, logits: Array) -> Array:
        """Scores [..., E], positive, of logits [..., E]."""
        raise NotImplementedError

    def check(self, experts: int, top_k: int) -> None:
        """Raise UserError if groups and experts do not match."""
        if self.balance_rate < 0:
            raise UserError(f"mlp.router.balance_rate: got {self.balance_rate}, must be 0 or more")
        if self.groups < 1 or experts % self.groups:
            raise UserError(f"mlp.router.groups: got {self.groups}, must divide mlp.experts {experts}")
        if not 1 <= self.top_groups <= self.groups:
            raise UserError(f"mlp.router.top_groups: got {self.top_groups}, must be 1 to groups {self.groups}")
        if top_k > (most := experts // self.groups * self.top_groups):
            raise UserError(f"mlp.top_k: got {top_k}, must be at most the {most} experts of {self.top_groups} groups")

    def __call__(
        self, param: ParamFactory, x: Array, experts: int, top_k: int, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """mask: bool [B, T], False for padding, which counts in no load and no loss. None: there is none"""
        param = dataclasses.replace(param, dtype="float32")
        tokens = param.rules("batch", "sequence", None)
        w = param("logits", (x.shape[-1], experts), ("embed", None), kind="other", decays=True)
        logits = linear(x.astype(jnp.float32), w, tokens)
        if self.bias:
            logits = logits + param("bias", (experts,), (None,), zeros)
        scores = self.scores(logits)
        balance = param("balance", (experts,), (None,), zeros) if self.balance_bias else None
        wanted = scores if balance is None else scores + balance

        def choose(wanted: Array) -> Array:
            return lax.top_k(self._in_top_groups(wanted), top_k)[1]

        if tokens is not None:  # each device for its own tokens: otherwise XLA would gather all scores on all devices
            names = set(jax.sharding.get_abstract_mesh().explicit_axes)
            choose = jax.shard_map(choose, in_specs=tokens, out_specs=tokens, axis_names=names, check_vma=False)
        ids = choose(lax.stop_gradient(wanted))
        chosen = jax.nn.one_hot(ids, experts, dtype=jnp.float32)  # a sum instead of a gather: see `cross_entropy`
        gates = jnp.sum(chosen * scores[..., None, :], -1)
        if self.renormalise:
            gates = gates / (jnp.sum(gates, -1, keepdims=True) + 1e-20)
        counts = jnp.sum(chosen if mask is None else jnp.where(mask[..., None, None], chosen, 0), (0, 1, 2))
        if balance is not None:
            param.update("balance", BalanceUpdate(counts - jnp.mean(counts), self.balance_rate))
        if self.load_balance:
            share = _mean(scores / jnp.sum(scores, -1, keepdims=True), mask)
            load = counts / jnp.maximum(jnp.sum(counts), 1)
            param.add_loss("load_balance", self.load_balance * experts * jnp.sum(load * share))
        if self.z_loss:
            param.add_loss("z_loss", self.z_loss * _mean(jax.nn.logsumexp(logits, -1) ** 2, mask))
        return ids, self.scale * gates

    def _in_top_groups(self, scores: Array) -> Array:
        """Scores, -inf outside of the best groups."""
        if self.groups == self.top_groups:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], -1)
        _, ids = lax.top_k(best, self.top_groups)
        kept = jnp.any(ids[..., None] == jnp.arange(self.groups), -2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


class Softmax(Router):
    """exp(logit_e) / sum exp(logit). Renormalised, it is the softmax of the selected experts' logits."""

    def scores(self, logits: Array) -> Array:
        return jax.nn.softmax(logits)


@dataclasses.dataclass(frozen=True)
class Sigmoid(Router):
    """1 / (1 + exp(-logit_e)) per expert, with a balance bias: DeepSeek-V3 (arXiv:2412.19437, eq. 12)."""

    balance_bias: bool = True

    def scores(self, logits: Array) -> Array:
        return jax.nn.sigmoid(logits)


def _mean(x: Array, mask: Array | None) -> Array:
    """Mean over tokens, x [B, T, ...] -> [...]; 0 where all are padding."""
    if mask is None:
        return jnp.mean(x, (0, 1))
    mask = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(mask, x, 0), (0, 1)) / jnp.maximum(jnp.sum(mask), 1)
