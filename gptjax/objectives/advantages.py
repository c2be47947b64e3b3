"""Advantages: rewards of replies less a baseline, as pure functions of a whole step's replies.

    group mean      A_i = r_i - mean of its group
    leave one out   A_i = r_i - mean of the others of its group

    GAE             delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1}

The recursion of generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16) goes from one
trained token to the next: what a tool said, and padding, are no steps.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.sharding import reshard
from gptjax.types import Array

Baseline = Literal["group", "leave_one_out", "none"]
Deviation = Literal["group", "batch", "none"]

NO_DEVIATION = 1e-3
"""A standard deviation of rewards below this counts as zero: to divide by it would blow up rounding errors."""


def relative_rewards(
    rewards: Array, groups: Array, baseline: Baseline, deviation: Deviation, epsilon: float = 1e-4
) -> Array:
    """Advantages of replies, float32 [B], from their rewards [B] and the numbers of their groups, int32 [B].

    baseline   subtracted from a reward: the mean of its group, that of the other replies in its group, or nothing
    deviation  standard deviation (ddof 1) to divide by, plus `epsilon`: that of the group's rewards, or the batch's

    A group of -1 is no reply: its advantage is 0. So is that of a reply whose group has no deviation (equal rewards,
    or, divided by it, one below `NO_DEVIATION`), and of one alone in its group, which has no baseline.
    """
    rewards, groups, back = *map(_replicated, (jnp.asarray(rewards, jnp.float32), jnp.asarray(groups))), _like(rewards)
    present = groups >= 0
    same = (groups[:, None] == groups) & present
    count = jnp.sum(same, -1)
    mean = jnp.sum(jnp.where(same, rewards, 0), -1) / jnp.maximum(count, 1)
    advantages = rewards
    if baseline != "none":
        others = count / jnp.maximum(count - 1, 1) if baseline == "leave_one_out" else 1.0
        highest = jnp.max(jnp.where(same, rewards, -jnp.inf), -1)
        lowest = jnp.min(jnp.where(same, rewards, jnp.inf), -1)
        advantages = jnp.where(highest > lowest, (rewards - mean) * others, 0)
    if deviation != "none":
        pool = same if deviation == "group" else jnp.broadcast_to(present, same.shape)
        _, spread = _moments(rewards, pool)
        advantages = jnp.where(spread < NO_DEVIATION, 0, advantages / (spread + epsilon))
    return reshard(jnp.where(present, advantages, 0), back)


def generalised_advantages(
    rewards: Array, values: Array, weights: Array, last_values: Array, gamma: float, lam: float
) -> tuple[Array, Array]:
    """GAE: (advantages, returns), float32 [B, T], 0 where a token has no weight. The returns are A + V.

    rewards      [B, T], of each token; those of tokens without a weight are ignored
    values       [B, T], of the state in which each token was chosen
    weights      [B, T], 0: not a token that the policy chose
    last_values  [B], value of the state after the last one: 0 of a reply that ended
    """
    spec = _like(values)
    arrays = [reshard(jnp.asarray(x, jnp.float32).T, _time_first(spec)) for x in (rewards, values, weights)]
    last_values = jnp.asarray(last_values, jnp.float32)

    def step(later, token):
        advantage, next_value = later
        reward, value, weight = token
        made = reward + gamma * next_value - value + gamma * lam * advantage
        chosen = weight > 0
        return (jnp.where(chosen, made, advantage), jnp.where(chosen, value, next_value)), jnp.where(chosen, made, 0)

    _, advantages = lax.scan(step, (jnp.zeros_like(last_values), last_values), arrays, reverse=True)
    advantages = reshard(advantages.T, spec)
    return advantages, jnp.where(weights > 0, advantages + values, 0)


def whiten(x: Array, weights: Array, shift: bool = True) -> Array:
    """(x - mean) / sqrt(variance + 1e-8) over the tokens with a weight, [B, T]; 0 at the others. The variance is
    unbiased (ddof 1).

    shift  subtract the mean. False: only divide
    """
    count = jnp.sum(weights)
    mean = jnp.sum(x * weights) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.square(x - mean) * weights) / jnp.maximum(count - 1, 1)
    return jnp.where(weights > 0, (x - mean if shift else x) * lax.rsqrt(variance + 1e-8), 0)


def _moments(x: Array, pool: Array) -> tuple[Array, Array]:
    """Mean and standard deviation (ddof 1), [B], of the x [B] in each row of the pool, bool [B, B]."""
    count = jnp.sum(pool, -1)
    mean = jnp.sum(jnp.where(pool, x, 0), -1) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(pool, jnp.square(x - mean[:, None]), 0), -1)
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def _like(x: Array) -> PartitionSpec | None:
    """PartitionSpec of an array inside a program, with an entry for each axis. None: no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *[None] * (jnp.ndim(x) - len(spec)))


def _replicated(x: Array) -> Array:
    return reshard(x, None if _like(x) is None else PartitionSpec(*[None] * jnp.ndim(x)))


def _time_first(spec: PartitionSpec | None) -> PartitionSpec | None:
    """Spec of the transpose [T, B], to scan over T."""
    return None if spec is None else PartitionSpec(None, spec[0])
