"""Proximal policy optimisation: advantages by a critic, a linear head on the policy's last hidden states.

    V_t        h_t w + b, value of the state in which token t is chosen, with h_t the hidden state after the final norm
    r_t        -kl k1_t, and the reward of the reply at its last token
    A, R       by generalised advantage estimation over the tokens that the policy chose (`advantages.py`), A whitened
    critic_t   1/2 max((V_t - R_t)^2, (clip(V_t, V_t before the update +- value_clip) - R_t)^2)

A reply that was cut off has a future: the state after its last token has the value at the sequence's last token. It is
exact where that token is in `tokens`, as an input without a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from gptjax.distributed.parameters import ParamInfo
from gptjax.objectives.advantages import generalised_advantages, whiten
from gptjax.objectives.logprobs import TargetLogprobs
from gptjax.objectives.policy import Divergence, Policy, PreparedEpisodes, replies_logprobs
from gptjax.protocols import ModelConfig
from gptjax.types import BESIDE, Array, Episodes, Params, UserError


@dataclasses.dataclass(frozen=True)
class PPO(Policy):
    """Proximal policy optimisation with generalised advantage estimation (Schulman et al. 2017, arXiv:1707.06347;
    of language models Ouyang et al. 2022, arXiv:2203.02155)."""

    gamma: float = 1.0
    """Discount of rewards per trained token."""
    gae_lambda: float = 0.95
    """Weight of later tokens in an advantage: 0 trusts the critic alone, 1 the rewards alone."""
    whiten: bool = True
    """Whiten the advantages: mean 0 and variance 1 over the step's trained tokens."""
    value_coefficient: float = 0.1
    """Coefficient of the critic's loss, whose gradient reaches the model too."""
    value_clip: float | None = 0.2
    """Largest change of a value that lowers the critic's loss. None: unlimited."""
    kl: float = 0.05
    kl_in: Literal["loss", "reward"] = "reward"
    kl_estimator: Divergence = "k1"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be from 0 to 1")
        if not self.value_coefficient > 0:
            raise UserError(f"value_coefficient: got {self.value_coefficient}, must be more than 0")
        if self.value_clip is not None and not self.value_clip > 0:
            raise UserError(f"value_clip: got {self.value_clip}, must be more than 0, or None")

    def parameters(self, model: ModelConfig) -> dict[str, ParamInfo]:
        width = getattr(model, "width", None)
        if width is None:
            raise UserError(f"objective: got PPO, whose critic needs a width, which {type(model).__name__} lacks")
        return {
            "value": ParamInfo((width, 1), (None, None), "head", decays=True),
            "value_bias": ParamInfo((1,), (None,)),
        }

    def score(
        self, apply: Callable, params: Params, batch: Episodes, with_entropy: bool = False
    ) -> tuple[TargetLogprobs, Array]:
        hidden = []

        def seen(*args: Any, mutable: list[str], **kwargs: Any) -> Any:
            output, found = apply(*args, mutable=[*mutable, "intermediates"], **kwargs)
            shown = found.pop("intermediates")
            if "norm_output" not in shown:
                raise UserError("objective: got PPO, whose critic needs a final norm, which the model lacks")
            hidden.append(shown["norm_output"])
            return output, found

        own = params[BESIDE]
        model = {name: branch for name, branch in params.items() if name != BESIDE}
        scores = replies_logprobs(seen, model, batch, with_entropy)
        values = (hidden[0].astype(jnp.float32) @ own["value"] + own["value_bias"])[..., 0]
        return scores, values

    def advantages(self, batch: Episodes, penalties: Array, values: Array) -> tuple[Array, Array]:
        weights, segments = jnp.asarray(batch.weights), jnp.asarray(batch.segments)
        rewards = _at_last(weights) * jnp.asarray(batch.rewards)[:, None] - penalties
        unfinished = 1 - jnp.asarray(batch.finished)
        last_values = unfinished * jnp.sum(_at_last(segments) * values, -1)
        made, returns = generalised_advantages(rewards, values, weights, last_values, self.gamma, self.gae_lambda)
        return whiten(made, weights) if self.whiten else made, returns

    def critic_losses(self, values: Array, batch: PreparedEpisodes) -> Array:
        return self.value_coefficient * value_losses(values, batch.old_values, batch.returns, self.value_clip)


def value_losses(values: Array, old_values: Array, returns: Array, clip: float | None) -> Array:
    """Clipped squared errors of values, halved."""
    losses = jnp.square(values - returns)
    if clip is not None:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        losses = jnp.maximum(losses, jnp.square(near - returns))
    return losses / 2


def _at_last(weights: Array) -> Array:
    """1 at the last token of each sequence with a weight, [B, T]; 0 elsewhere."""
    index = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    last = jnp.max(jnp.where(weights > 0, index, -1), -1, keepdims=True)
    return (index == last).astype(jnp.float32)
