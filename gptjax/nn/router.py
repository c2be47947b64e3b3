"""Routers of a mixture of experts, as parts (see `module.py`): which experts a token goes to, and with what weights."""

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
    """Update of a balance bias, `rate sign(mean load - load)`: no gradient. Its loads add up over microbatches."""

    excess: Array
    """float32 [..., E]: assignments to each expert above the mean."""
    rate: float = dataclasses.field(metadata={"static": True})

    def __call__(self) -> Array:
        return -self.rate * jnp.sign(self.excess)


@dataclasses.dataclass(frozen=True)
class Router(Part):
    """A part `router(param, x [B, T, D], experts E, top_k k) -> (ids int32 [B, T, k], gates float32 [B, T, k])`.

        logits = W x + bias                                score = softmax or sigmoid of the logits
        ids = the top k of score + balance bias            gates = scale score_ids / sum score_ids

    all of it float32. A subclass says what the scores are. To use the experts evenly there is a loss, and there is a
    bias that enters the choice alone and follows the loads:

        load_e = share of the assignments that go to expert e        P_e = mean over tokens of score_e / sum score
        load balance = E sum_e load_e P_e, which is 1 when balanced       (Switch Transformers, arXiv:2101.03961, eq. 4)
        z = mean over tokens of (log sum_e exp logit_e)^2                 (ST-MoE, arXiv:2202.08906, eq. 5)
        balance bias_e += rate sign(mean load - load_e)                   (Wang et al. 2024, arXiv:2408.15664)
    """

    renormalise: bool = True
    """Whether the weights of the chosen experts add up to 1, as in Mixtral, or are what they are, as in OLMoE."""
    scale: float = 1.0
    """Multiplies the weights."""
    bias: bool = False
    """Whether the logits have a learned bias, as in gpt-oss."""
    groups: int = 1
    """Experts lie in this many groups, and a token only goes to the best of them: those whose two best experts score
    highest (DeepSeek-V3)."""
    top_groups: int = 1
    """How many groups a token goes to."""
    load_balance: float = 0.0
    """Weight of the load-balance loss in the training loss; 0.01 is usual."""
    z_loss: float = 0.0
    """Weight of the z-loss, which keeps logits small; 0.001 is usual."""
    balance_bias: bool = False
    """Whether there is a balance bias."""
    balance_rate: float = 1e-3
    """Change of the balance bias per step."""

    def scores(self, logits: Array) -> Array:
        """[..., E] -> [..., E], positive."""
        raise NotImplementedError

    def check(self, experts: int, top_k: int) -> None:
        """Raises UserError where groups and experts do not go together."""
        if self.balance_rate < 0:
            raise UserError(f"mlp.router.balance_rate: got {self.balance_rate}, must be 0 or more")
        if self.groups < 1 or experts % self.groups:
            raise UserError(f"mlp.router.groups: got {self.groups}, must divide mlp.experts {experts}")
        if not 1 <= self.top_groups <= self.groups:
            raise UserError(f"mlp.router.top_groups: got {self.top_groups}, must be 1 to groups {self.groups}")
        if top_k > (most := experts // self.groups * self.top_groups):
            raise UserError(f"mlp.top_k: got {top_k}, must be at most the {most} experts of {self.top_groups} groups")

    def __call__(self, param: ParamFactory, x: Array, experts: int, top_k: int) -> tuple[Array, Array]:
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

        if tokens is not None:  # each device for its own tokens: XLA would gather the scores of all on all of them
            names = set(jax.sharding.get_abstract_mesh().explicit_axes)
            choose = jax.shard_map(choose, in_specs=tokens, out_specs=tokens, axis_names=names, check_vma=False)
        ids = choose(lax.stop_gradient(wanted))
        chosen = jax.nn.one_hot(ids, experts, dtype=jnp.float32)  # a sum, not a lookup: see `cross_entropy`
        gates = jnp.sum(chosen * scores[..., None, :], -1)
        if self.renormalise:
            gates = gates / (jnp.sum(gates, -1, keepdims=True) + 1e-20)
        counts = jnp.sum(chosen, (0, 1, 2))
        if balance is not None:
            param.update("balance", BalanceUpdate(counts - jnp.mean(counts), self.balance_rate))
        if self.load_balance:
            share = jnp.mean(scores / jnp.sum(scores, -1, keepdims=True), (0, 1))
            load = counts / jnp.sum(counts)
            param.add_loss("load_balance", self.load_balance * experts * jnp.sum(load * share))
        if self.z_loss:
            param.add_loss("z_loss", self.z_loss * jnp.mean(jax.nn.logsumexp(logits, -1) ** 2))
        return ids, self.scale * gates

    def _in_top_groups(self, scores: Array) -> Array:
        """The scores, -inf outside of the best groups."""
        if self.groups == self.top_groups:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], -1)
        _, ids = lax.top_k(best, self.top_groups)
        kept = jnp.any(ids[..., None] == jnp.arange(self.groups), -2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


class Softmax(Router):
    """exp(logit_e) / sum exp(logit). Renormalised, that is the softmax over the chosen experts' logits."""

    def scores(self, logits: Array) -> Array:
        return jax.nn.softmax(logits)


@dataclasses.dataclass(frozen=True)
class Sigmoid(Router):
    """1 / (1 + exp(-logit_e)), each expert for itself, and a balance bias: DeepSeek-V3 (arXiv:2412.19437, eq. 12)."""

    balance_bias: bool = True

    def scores(self, logits: Array) -> Array:
        return jax.nn.sigmoid(logits)
