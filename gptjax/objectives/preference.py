"""Preference losses: raise the likelihood of a chosen reply over that of a rejected one.

    c, r    log-probability of the chosen and of the rejected reply, the sum over its tokens
    c', r'  the same under a frozen reference, the model at the stage's start
    |c|     number of tokens

    DPO     -log sigmoid(beta ((c - c') - (r - r')))
            length_normalised: -log sigmoid(beta ((c - c') / |c| - (r - r') / |r|)); reference_free: c' = r' = 0
    IPO     ((c - c') / |c| - (r - r') / |r| - 1 / (2 beta))^2
    SimPO   -log sigmoid(beta (c / |c| - r / |r|) - gamma)
    CPO     -log sigmoid(beta (c - r)) - weight c / |c|
    ORPO    -c / |c| - weight log sigmoid(log odds(c / |c|) - log odds(r / |r|)),  log odds(x) = x - log(1 - e^x)

Each is a mean over pairs. Dropout is off: reference and model must agree before the first step, where the loss of DPO
is log 2.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gptjax.objectives.logprobs import target_logprobs
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Array, Batch, Key, Metrics, Params, PreferencePairs, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replies:
    """Both replies of B pairs: float32 [B] each."""

    chosen: Array
    """Log-probability of the chosen reply, in nats."""
    rejected: Array
    chosen_tokens: Array
    """Number of its tokens, at least 1."""
    rejected_tokens: Array

    @property
    def chosen_mean(self) -> Array:
        """Log-probability per token."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Array:
        return self.rejected / self.rejected_tokens

    def over(self, reference: Replies) -> Replies:
        """The same replies with log-ratios to the reference in place of log-probabilities."""
        chosen, rejected = self.chosen - reference.chosen, self.rejected - reference.rejected
        return dataclasses.replace(self, chosen=chosen, rejected=rejected)


def log_likelihoods(apply: Callable, params: Params, batch: PreferencePairs) -> tuple[Replies, Any]:
    """Replies of a batch, and the auxiliary losses of the model's parts.

    apply  a decoder's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, V], cache)`
    """
    of = target_logprobs(apply, params, batch)
    segments, weights = jnp.asarray(batch.segments), jnp.asarray(batch.weights)
    chosen, rejected = (weights * (segments == number) for number in (1, 2))
    sums = (jnp.sum(side * of.logprobs, -1) for side in (chosen, rejected))
    tokens = (jnp.maximum(jnp.sum(side, -1), 1.0) for side in (chosen, rejected))
    return Replies(*sums, *tokens), of.losses


@dataclasses.dataclass(frozen=True)
class Preference(Objective, abc.ABC):
    """A loss of pairs of replies."""

    batch_type: ClassVar[type[Batch]] = PreferencePairs
    unit: ClassVar[str] = "pair"

    @abc.abstractmethod
    def loss(self, replies: Replies, reference: Replies) -> Array:
        """Loss of each pair, float32 [B].

        reference  of the frozen model; of the model itself, without a gradient, if the objective has no `reference`"""

    @abc.abstractmethod
    def margin(self, replies: Replies, reference: Replies) -> Array:
        """Reward of the chosen reply less that of the rejected one, float32 [B], as the loss understands rewards."""

    def __call__(
        self,
        apply: Callable,
        params: Params,
        batch: PreferencePairs,
        key: Key | None = None,
        frozen: Params | None = None,
    ) -> Metrics:
        """Metrics per pair: "loss", "preference_loss" (the loss without the auxiliary losses of the model's parts),
        "accuracy" (share of pairs with a positive margin; half of one of 0), "margin", and the log-probabilities
        "chosen_logprob" and "rejected_logprob", in nats.

        frozen  parameters of the reference, if the objective has one
        """
        replies, sown = log_likelihoods(apply, params, batch)
        if self.reference:
            assert frozen is not None, "the objective needs the parameters of its reference"
            reference = jax.lax.stop_gradient(log_likelihoods(apply, frozen, batch)[0])
        else:
            reference = jax.lax.stop_gradient(replies)
        present = (jnp.max(jnp.asarray(batch.segments), -1) == 2).astype(jnp.float32)
        pairs, margin = jnp.sum(present), self.margin(replies, reference)
        right = (margin > 0) + 0.5 * (margin == 0)
        loss = jnp.sum(present * self.loss(replies, reference))
        metrics = {
            "preference_loss": (loss, pairs),
            "accuracy": (jnp.sum(present * right), pairs),
            "margin": (jnp.sum(present * margin), pairs),
            "chosen_logprob": (jnp.sum(present * replies.chosen), pairs),
            "rejected_logprob": (jnp.sum(present * replies.rejected), pairs),
        }
        return with_parts(loss, pairs, sown, metrics)


@dataclasses.dataclass(frozen=True)
class DPO(Preference):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""

    beta: float = 0.1
    """Weight of the divergence from the reference: the larger, the closer the model stays."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, below 1/2 (conservative DPO, Mitchell 2023)."""
    length_normalised: bool = False
    """True: log-ratios per token, so that long replies weigh no more than short ones (Lambert et al. 2024,
    arXiv:2411.15124, equation 6). `beta` must be larger then, by about the tokens of a reply."""
    reference_free: bool = False
    """True: a reference that gives all replies the same probability, in place of the model at the stage's start."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing: got {self.label_smoothing}, must be from 0 to below 0.5")

    @property
    def reference(self) -> bool:
        return not self.reference_free

    def loss(self, replies: Replies, reference: Replies) -> Array:
        margin, wrong = self.margin(replies, reference), self.label_smoothing
        return -(1 - wrong) * jax.nn.log_sigmoid(margin) - wrong * jax.nn.log_sigmoid(-margin)

    def margin(self, replies: Replies, reference: Replies) -> Array:
        ratios = replies if self.reference_free else replies.over(reference)
        if self.length_normalised:
            return self.beta * (ratios.chosen_mean - ratios.rejected_mean)
        return self.beta * (ratios.chosen - ratios.rejected)


@dataclasses.dataclass(frozen=True)
class IPO(Preference):
    """Identity preference optimisation, which labels without noise do not drive apart without end (Azar et al. 2023,
    arXiv:2310.12036, equation 17), with log-probabilities per token, as its authors advise."""

    beta: float = 0.1
    """Weight of the divergence from the reference; the margin is driven to 1 / (2 beta)."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    @property
    def reference(self) -> bool:
        return True

    def loss(self, replies: Replies, reference: Replies) -> Array:
        return (self.margin(replies, reference) - 1 / (2 * self.beta)) ** 2

    def margin(self, replies: Replies, reference: Replies) -> Array:
        ratios = replies.over(reference)
        return ratios.chosen_mean - ratios.rejected_mean


@dataclasses.dataclass(frozen=True)
class SimPO(Preference):
    """Simple preference optimisation, without a reference (Meng et al. 2024, arXiv:2405.14734, equation 6)."""

    beta: float = 2.0
    """Scale of the log-probabilities per token."""
    gamma: float = 1.0
    """Margin that the chosen reply should have."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def loss(self, replies: Replies, reference: Replies) -> Array:
        return -jax.nn.log_sigmoid(self.margin(replies, reference) - self.gamma)

    def margin(self, replies: Replies, reference: Replies) -> Array:
        return self.beta * (replies.chosen_mean - replies.rejected_mean)


@dataclasses.dataclass(frozen=True)
class CPO(Preference):
    """Contrastive preference optimisation, without a reference (Xu et al. 2024, arXiv:2401.08417, equation 5)."""

    beta: float = 0.1
    """Scale of the log-probabilities."""
    weight: float = 1.0
    """Weight of the chosen reply's cross entropy, per token."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def loss(self, replies: Replies, reference: Replies) -> Array:
        return -jax.nn.log_sigmoid(self.margin(replies, reference)) - self.weight * replies.chosen_mean

    def margin(self, replies: Replies, reference: Replies) -> Array:
        return self.beta * (replies.chosen - replies.rejected)


@dataclasses.dataclass(frozen=True)
class ORPO(Preference):
    """Odds ratio preference optimisation: fine-tuning on the chosen replies with a penalty, without a reference (Hong
    et al. 2024, arXiv:2403.07691, equation 6)."""

    weight: float = 0.1
    """Weight of the odds ratio's loss."""

    def loss(self, replies: Replies, reference: Replies) -> Array:
        return -replies.chosen_mean - self.weight * jax.nn.log_sigmoid(self.margin(replies, reference))

    def margin(self, replies: Replies, reference: Replies) -> Array:
        return _log_odds(replies.chosen_mean) - _log_odds(replies.rejected_mean)


def _log_odds(logprob: Array) -> Array:
    """log(p / (1 - p)) of log p < 0; finite, with a finite gradient, up to p = 1 - 2^-20."""
    logprob = jnp.minimum(logprob, -(2.0**-20))
    return logprob - jnp.log(-jnp.expm1(logprob))


def _positive(field: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{field}: got {value}, must be more than 0")
