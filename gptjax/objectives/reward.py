"""The loss of reward models.

    r_c, r_r   reward of the chosen and of the rejected reply, read at the last token of each conversation
    m          margin of the pair, 0 if the data have none

    Bradley-Terry   -log sigmoid(r_c - r_r - m) + centering (r_c + r_r)^2

A pair says nothing about the mean of the rewards; the second term keeps it near 0 (Eisenstein et al. 2023,
arXiv:2312.09244).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Batch, Key, Metrics, Params, PreferencePairs, UserError


@dataclasses.dataclass(frozen=True)
class BradleyTerry(Objective):
    """Reward model of pairs: P(chosen > rejected) = sigmoid(r_c - r_r) (Ouyang et al. 2022, arXiv:2203.02155, equation
    1), with margins of the data (Touvron et al. 2023, arXiv:2307.09288, equation 2). A mean over pairs."""

    centering: float = 0.0
    """Weight of (r_c + r_r)^2, `center_rewards_coefficient` in TRL. 0: none."""

    architectures: ClassVar[tuple[str, ...]] = ("regressor",)
    batch_type: ClassVar[type[Batch]] = PreferencePairs
    unit: ClassVar[str] = "pair"

    def __post_init__(self) -> None:
        if not self.centering >= 0:
            raise UserError(f"objective.centering: got {self.centering}, must be at least 0")

    def __call__(self, apply: Callable, params: Params, batch: PreferencePairs, key: Key | None = None) -> Metrics:
        """Metrics per pair: "loss", "reward_loss" (the loss without the auxiliary losses of the model's parts),
        "accuracy" (share of pairs whose chosen reply has the higher reward; half of one with equal rewards),
        "reward_margin" (r_c - r_r), "chosen_reward" and "rejected_reward".

        apply  a regressor's: `apply({"params": params}, tokens, positions, segments, documents=2) -> (rewards
               [B, 2, 1], None)`
        key    None: no dropout
        """
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (rewards, _), sown = apply(*inputs, documents=2, mutable=["losses"], **rngs)
        chosen, rejected = jnp.moveaxis(rewards[..., 0].astype(jnp.float32), 1, 0)
        present = (jnp.max(jnp.asarray(batch.segments), -1) == 2).astype(jnp.float32)
        pairs, difference = jnp.sum(present), chosen - rejected
        margins = 0.0 if batch.margins is None else jnp.asarray(batch.margins)
        each = -jax.nn.log_sigmoid(difference - margins) + self.centering * (chosen + rejected) ** 2
        loss = jnp.sum(present * each)
        right = (difference > 0) + 0.5 * (difference == 0)
        metrics = {
            "reward_loss": (loss, pairs),
            "accuracy": (jnp.sum(present * right), pairs),
            "reward_margin": (jnp.sum(present * difference), pairs),
            "chosen_reward": (jnp.sum(present * chosen), pairs),
            "rejected_reward": (jnp.sum(present * rejected), pairs),
        }
        return with_parts(loss, pairs, sown, metrics)
