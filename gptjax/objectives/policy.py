"""Policy-gradient objectives: make replies with a high reward likelier.

    w_t     1 if the policy chose token t of a reply, else 0; |w| their number
    ratio   exp(log p_t - log p_t before the first update on the batch), of a token; or of a reply: exp of the sum, or
            of the mean, over its tokens
    A       advantage: reward of the reply less a baseline, over a deviation (`advantages.py`)
    c       weight of what was sampled: p before the update / p of the sampler, at most a cap

    loss_t = -c min(ratio A, clip(ratio, 1 - low, 1 + high) A) + kl KL(policy, reference) - entropy H(policy)

averaged over all tokens of the step, over each reply and then over replies, or over a constant number of tokens per
reply. GRPO, RLOO and others are settings of `PolicyGradient`. Dropout is off: the ratio is 1 before the first update.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import map_microbatches
from gptjax.objectives.advantages import Baseline, Deviation, relative_rewards
from gptjax.objectives.logprobs import TargetLogprobs, target_logprobs
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Array, Batch, Episodes, Key, Metrics, Params, UserError

LARGEST = 20.0
"""Bound of a logarithm of a ratio of probabilities, either side: e^20 does not overflow."""

Divergence = Literal["k1", "k2", "k3", "weighted_k3"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedEpisodes(Episodes):
    """Replies with what their update needs, float32 [B, T] each. Replies that do not count have no weights.

    old_logprobs        log-probability of each target before the first update on this batch
    reference_logprobs  the same under the reference; `old_logprobs` without one
    old_values          value of the state in which each target was chosen, by a critic; 0 without one
    advantages          of each target
    returns             what a critic's values should be; 0 without one
    """

    old_logprobs: Array
    reference_logprobs: Array
    old_values: Array
    advantages: Array
    returns: Array


def replies_logprobs(apply: Callable, params: Params, batch: Episodes, with_entropy: bool = False) -> TargetLogprobs:
    """Log-probabilities of the targets of replies at the temperature that they were drawn at."""
    temperature = jnp.asarray(batch.temperature)
    temperature = jnp.where(temperature > 0, temperature, 1)  # sequences without a reply have none
    return target_logprobs(apply, params, batch, temperature, with_entropy)


def log_ratio(logprobs: Array, others: Array, weights: Array) -> Array:
    """log(p / q) of tokens, [B, T], within +-20; 0 where a token has no weight."""
    return jnp.clip(jnp.where(weights > 0, logprobs - others, 0), -LARGEST, LARGEST)


def divergence(estimator: Divergence, log_ratio: Array, ratio: Array | float = 1.0) -> Array:
    """Estimate of KL(p || q) from samples of p, with x = log(p / q) of each (Schulman 2020, "Approximating KL
    divergence"):

        k1 = x        k2 = x^2 / 2        k3 = e^-x - 1 + x        weighted_k3 = ratio k3

    The mean gradient is another matter: in a loss, k2 and `weighted_k3` have that of KL(p || q), k3 has that of
    KL(q || p), and k1 has none.

    ratio  of p to the distribution that was sampled from
    """
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return jnp.square(log_ratio) / 2
        case "k3":
            return jnp.expm1(-log_ratio) + log_ratio
        case "weighted_k3":
            return ratio * (jnp.expm1(-log_ratio) + log_ratio)


@dataclasses.dataclass(frozen=True)
class Policy(Objective, abc.ABC):
    """A clipped policy-gradient loss. A subclass defines the advantages."""

    batch_type: ClassVar[type[Batch]] = Episodes
    prepares: ClassVar[bool] = True

    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean of the tokens' losses: over all tokens of the step, over each reply's and then over replies, or over
    `max_tokens` tokens per reply, however long it is."""
    max_tokens: int | None = None
    """Tokens per reply with aggregation "constant". None: the length of the batch's sequences."""
    ratio: Literal["token", "sequence", "geometric_mean"] = "token"
    """Level of the ratio: of each token, of the whole reply, or the geometric mean of the reply's tokens."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - `clip_low`."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + `clip_high`."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative (Ye et al. 2020, arXiv:1912.09729). None: unlimited."""
    kl: float = 0.0
    """Coefficient of the KL divergence from the reference, the model at the stage's start. 0: no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add the divergence to the loss of each token, or subtract it from the reward."""
    kl_estimator: Divergence = "k3"
    """Estimator of the divergence: k1, k2, k3 (Schulman 2020), or k3 times the ratio, whose gradient is unbiased."""
    entropy: float = 0.0
    """Coefficient of the entropy of each token's distribution, which is maximised."""
    correction: Correction = "token_truncate"
    """Weight of what was sampled, p before the update / p of the sampler, of each token or of the whole reply. Above
    `correction_cap` it is truncated, or the token or reply is masked."""
    correction_cap: float = 2.0
    """Largest weight of what was sampled."""
    mask_truncated: bool = False
    """Leave out replies that were cut off at their maximum length, in the loss and in what it is divided by."""

    def __post_init__(self) -> None:
        for field in ("clip_low", "clip_high", "kl", "entropy"):
            if not getattr(self, field) >= 0:
                raise UserError(f"{field}: got {getattr(self, field)}, must be 0 or more")
        if not self.correction_cap > 0:
            raise UserError(f"correction_cap: got {self.correction_cap}, must be more than 0")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise UserError(f"dual_clip: got {self.dual_clip}, must be more than 1 + clip_high, or None")
        if self.max_tokens is not None and (self.max_tokens < 1 or self.aggregation != "constant"):
            raise UserError(
                f"max_tokens: got {self.max_tokens}, must be at least 1 with aggregation constant, else None"
            )
        if self.kl_in == "reward" and self.kl_estimator == "weighted_k3":
            raise UserError("kl_estimator: got weighted_k3, must be k1, k2 or k3 in the reward")

    @property
    def reference(self) -> bool:
        return self.kl > 0

    @abc.abstractmethod
    def advantages(self, batch: Episodes, penalties: Array, values: Array) -> tuple[Array, Array]:
        """Advantages of the tokens of a step, and the returns that their values should be, [B, T].

        penalties  to subtract from the reward of each token, [B, T]
        values     by the critic, [B, T]"""

    def score(
        self, apply: Callable, params: Params, batch: Episodes, with_entropy: bool = False
    ) -> tuple[TargetLogprobs, Array]:
        """Log-probabilities of a batch, and a critic's values [B, T]."""
        scores = replies_logprobs(apply, params, batch, with_entropy)
        return scores, jnp.zeros_like(scores.logprobs)

    def critic_losses(self, values: Array, batch: PreparedEpisodes) -> Array | None:
        """Losses of the critic's values, [B, T]. None: no critic."""
        return None

    def prepare(
        self, apply: Callable, params: Params, batch: Episodes, *frozen: Params, parts: int = 1
    ) -> PreparedEpisodes:
        """Replies of a step with the log-probabilities before its first update, those of the reference, and advantages.

        parts  microbatches of the model's forward passes"""

        def scores(part: Episodes) -> tuple[Array, Array, Array]:
            old, values = self.score(apply, params, part)
            reference = replies_logprobs(apply, frozen[0], part) if self.reference else old
            return old.logprobs, reference.logprobs, values

        old, reference, values = map_microbatches(scores, batch, parts)
        present = (jnp.asarray(batch.groups) >= 0).astype(jnp.float32)
        weights = jnp.asarray(batch.weights) * present[:, None]
        penalties = jnp.zeros_like(old)
        if self.reference and self.kl_in == "reward":
            penalties = weights * self.kl * divergence(self.kl_estimator, log_ratio(old, reference, weights))
        batch = dataclasses.replace(batch, weights=weights)
        advantages, returns = self.advantages(batch, penalties, values)
        if self.mask_truncated:
            batch = dataclasses.replace(batch, weights=weights * jnp.asarray(batch.finished)[:, None])
        made = {
            "old_logprobs": old,
            "reference_logprobs": reference,
            "old_values": values,
            "advantages": advantages * weights,
            "returns": returns,
        }
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Episodes)}
        return jax.lax.stop_gradient(PreparedEpisodes(**arrays, **made))

    def __call__(
        self, apply: Callable, params: Params, batch: PreparedEpisodes, key: Key | None = None, *frozen: Params
    ) -> Metrics:
        """Metrics: "loss", "policy_loss" (the loss without divergence, entropy, critic and the auxiliary losses of the
        model's parts) and "value_loss" of a critic.

        Per token: "entropy", "kl" to the reference (k3), "clipped" (share whose ratio is clipped), and of the model
        before the update against the sampler "sampler_kl" (k3), "sampler_gap" (mean difference of log-probabilities)
        and "sampler_outside" (share whose ratio is outside the clip range). Per reply: "reward", "zero_advantage"
        (share without an advantage).

        batch  as `prepare` returns it"""
        assert isinstance(batch, PreparedEpisodes), "the batch must be prepared first"
        scores, values = self.score(apply, params, batch, with_entropy=True)
        assert scores.entropy is not None
        weights = jnp.asarray(batch.weights)
        losses, clipped = self.losses(scores.logprobs, batch)
        total = losses - self.entropy * scores.entropy
        if (critic := self.critic_losses(values, batch)) is not None:
            total += critic
        behind = log_ratio(scores.logprobs, batch.reference_logprobs, weights)
        if self.reference and self.kl_in == "loss":
            ratio = jnp.exp(self._at_level(log_ratio(scores.logprobs, batch.old_logprobs, weights), weights))
            total += self.kl * divergence(self.kl_estimator, behind, ratio)
        off, tokens = log_ratio(batch.old_logprobs, jnp.asarray(batch.logprobs), weights), jnp.sum(weights)
        outside = (jnp.exp(off) < 1 - self.clip_low) | (jnp.exp(off) > 1 + self.clip_high)
        per_token = {
            "entropy": scores.entropy,
            **({"kl": divergence("k3", behind)} if self.reference else {}),
            "clipped": clipped,
            "sampler_kl": divergence("k3", -off),
            "sampler_gap": jnp.abs(off),
            "sampler_outside": outside,
        }
        replies = (jnp.sum(weights, -1) > 0).astype(jnp.float32)
        per_reply = {
            "reward": jnp.asarray(batch.rewards),
            "zero_advantage": jnp.max(jnp.abs(batch.advantages), -1) == 0,
        }
        loss, weight = self.aggregate(total, weights)
        metrics = {"policy_loss": self.aggregate(losses, weights)}
        if critic is not None:
            metrics["value_loss"] = self.aggregate(critic, weights)
        metrics |= {name: (jnp.sum(x * weights), tokens) for name, x in per_token.items()}
        metrics |= {name: (jnp.sum(x * replies), jnp.sum(replies)) for name, x in per_reply.items()}
        return with_parts(loss, weight, scores.losses, metrics)

    def losses(self, logprobs: Array, batch: PreparedEpisodes) -> tuple[Array, Array]:
        """Clipped losses of the tokens and whether their ratio is clipped, [B, T]."""
        weights, advantages = jnp.asarray(batch.weights), batch.advantages
        ratio = jnp.exp(self._at_level(log_ratio(logprobs, batch.old_logprobs, weights), weights))
        inside = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        limited = ratio if self.dual_clip is None else jnp.minimum(ratio, self.dual_clip)
        gain = jnp.minimum(limited * advantages, inside * advantages)
        clipped = gain < ratio * advantages
        if self.correction != "none":
            gain *= self._sampled_weights(batch)
        return -gain, clipped

    def aggregate(self, x: Array, weights: Array) -> tuple[Array, Array]:
        """(sum, weight) of the tokens' mean, as `aggregation` says."""
        tokens = jnp.sum(weights, -1)
        replies = jnp.sum((tokens > 0).astype(jnp.float32))
        match self.aggregation:
            case "token":
                return jnp.sum(x * weights), jnp.sum(tokens)
            case "sequence":
                return jnp.sum(jnp.sum(x * weights, -1) / jnp.maximum(tokens, 1)), replies
            case "constant":
                return jnp.sum(x * weights), replies * (self.max_tokens or weights.shape[1])

    def _at_level(self, logs: Array, weights: Array) -> Array:
        """Logarithms of tokens' ratios at the level of `ratio`: [B, T], or [B, 1] of replies."""
        if self.ratio == "token":
            return logs
        total = jnp.sum(logs * weights, -1, keepdims=True)
        if self.ratio == "geometric_mean":
            return total / jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1)
        return jnp.clip(total, -LARGEST, LARGEST)

    def _sampled_weights(self, batch: PreparedEpisodes) -> Array:
        """Weights of what was sampled: [B, T], or [B, 1] of replies."""
        weights = jnp.asarray(batch.weights)
        logs = log_ratio(batch.old_logprobs, jnp.asarray(batch.logprobs), weights)
        if self.correction.startswith("sequence"):
            logs = jnp.clip(jnp.sum(logs * weights, -1, keepdims=True), -LARGEST, LARGEST)
        sampled, cap = jnp.exp(logs), self.correction_cap
        return jnp.where(sampled <= cap, sampled, 0.0 if self.correction.endswith("mask") else cap)


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Policy):
    """Policy gradient with the rewards of other replies as the baseline. GRPO, RLOO, Dr. GRPO, DAPO and GSPO are
    settings of it."""

    baseline: Baseline = "group"
    """Subtracted from a reply's reward: the mean of its group, the mean of the others in its group, or nothing."""
    deviation: Deviation = "group"
    """Standard deviation (ddof 1) of rewards that advantages are divided by: the group's, the step's, or none. Below
    1e-3 it counts as zero, and so do the advantages."""
    epsilon: float = 1e-4
    """Added to the deviation."""

    def advantages(self, batch: Episodes, penalties: Array, values: Array) -> tuple[Array, Array]:
        rewards = jnp.asarray(batch.rewards) - jnp.sum(penalties, -1)
        made = relative_rewards(rewards, jnp.asarray(batch.groups), self.baseline, self.deviation, self.epsilon)
        return made[:, None] * batch.weights, jnp.zeros_like(values)


@dataclasses.dataclass(frozen=True)
class GRPO(PolicyGradient):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, equations 3 and 4)."""

    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    kl: float = 0.04


@dataclasses.dataclass(frozen=True)
class DrGRPO(PolicyGradient):
    """GRPO without its biases towards long wrong replies and towards groups of nearly equal rewards (Liu et al. 2025,
    arXiv:2503.20783, section 3)."""

    aggregation: Literal["token", "sequence", "constant"] = "constant"
    deviation: Deviation = "none"


@dataclasses.dataclass(frozen=True)
class DAPO(PolicyGradient):
    """Decoupled clip: a wider range upwards, a mean over tokens, replies that were cut off left out (Yu et al. 2025,
    arXiv:2503.14476, equation 8). Its dynamic sampling is a choice of the rollouts."""

    clip_high: float = 0.28
    mask_truncated: bool = True


@dataclasses.dataclass(frozen=True)
class GSPO(PolicyGradient):
    """Group sequence policy optimisation: the geometric mean of a reply's ratios, clipped (Zheng et al. 2025,
    arXiv:2507.18071, equation 5)."""

    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    ratio: Literal["token", "sequence", "geometric_mean"] = "geometric_mean"
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclasses.dataclass(frozen=True)
class RLOO(PolicyGradient):
    """REINFORCE leave-one-out: a whole reply is one action, KL in the reward (Ahmadian et al. 2024, arXiv:2402.14740,
    equation 4), with the ratio clipped, as trl has it."""

    baseline: Baseline = "leave_one_out"
    deviation: Deviation = "none"
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    ratio: Literal["token", "sequence", "geometric_mean"] = "sequence"
    kl: float = 0.05
    kl_in: Literal["loss", "reward"] = "reward"
    kl_estimator: Divergence = "k1"
