"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8): replies that are desirable or
not, without pairs.

    r    log-ratio of a reply: log pi(y | x) - log pi_ref(y | x), the sum over its tokens
    z    baseline: max(0, mean of the log-ratios of replies to the prompts of others), without a gradient

    desirable    desirable_weight   (1 - sigmoid(beta (r - z)))
    undesirable  undesirable_weight (1 - sigmoid(beta (z - r)))

The loss is a mean over replies. z estimates the divergence of the model from its reference: `prepare` computes it once
from the whole batch of a step, so that the gradient does not depend on the number of microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.distributed.sharding import reshard, split_microbatches
from gptjax.objectives.logprobs import target_logprobs
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Array, Batch, Key, LabelledReplies, Metrics, Params, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepliesWithBaseline(LabelledReplies):
    """A batch with the baseline of its step.

    baseline  float32 [B]  z, the same for all
    """

    baseline: Array


@dataclasses.dataclass(frozen=True)
class KTO(Objective):
    """Loss of replies with labels: `data.UnpairedPreferences`."""

    batch_type: ClassVar[type[Batch]] = LabelledReplies
    unit: ClassVar[str] = "reply"
    prepares: ClassVar[bool] = True

    beta: float = 0.1
    """Weight of the divergence from the reference: the larger, the closer the model stays."""
    desirable_weight: float = 1.0
    """Weight of desirable replies. Its product with their number should be 1 to 4/3 times that of the undesirable."""
    undesirable_weight: float = 1.0
    """Weight of undesirable replies."""

    def __post_init__(self) -> None:
        for field in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, field) > 0:
                raise UserError(f"{field}: got {getattr(self, field)}, must be more than 0")

    @property
    def reference(self) -> bool:
        return True

    def loss(self, ratio: Array, baseline: Array, desirable: Array) -> Array:
        """Loss of each reply, float32 [B]: its log-ratio, the baseline, and 1 if it is desirable."""
        gain = self.beta * (ratio - baseline)
        wanted = self.desirable_weight * jax.nn.sigmoid(-gain)
        return jnp.where(desirable > 0, wanted, self.undesirable_weight * jax.nn.sigmoid(gain))

    def prepare(
        self, apply: Callable, params: Params, batch: LabelledReplies, *frozen: Params, parts: int = 1
    ) -> RepliesWithBaseline:
        """The batch of a step with its baseline, from each prompt with the reply of the sequence before it. 0 if there
        is only one reply."""
        params, (reference,) = jax.lax.stop_gradient((params, frozen))
        split = jax.tree.map(lambda x: split_microbatches(x, parts), mismatched(batch))
        ratios = jax.lax.map(lambda part: _log_ratio(apply, params, part, reference)[0], split)
        counts = jnp.max(split.weights, -1)  # 0 for padding, and for a reply without another
        baseline = jnp.maximum(jnp.sum(counts * ratios) / jnp.maximum(jnp.sum(counts), 1.0), 0.0)
        return RepliesWithBaseline(**vars(batch), baseline=baseline + jnp.zeros_like(jnp.asarray(batch.desirable)))

    def __call__(
        self,
        apply: Callable,
        params: Params,
        batch: RepliesWithBaseline,
        key: Key | None = None,
        frozen: Params | None = None,
    ) -> Metrics:
        """Metrics per reply: "loss", "preference_loss" (the loss without the auxiliary losses of the model's parts),
        "accuracy" (share of replies whose log-ratio is above the baseline if they are desirable, below it if not; half
        of one that equals it), "desirable_reward" and "undesirable_reward" (beta r), and "kl", the baseline.

        batch   from `prepare`
        frozen  parameters of the reference
        """
        assert frozen is not None, "the objective needs the parameters of its reference"
        assert isinstance(batch, RepliesWithBaseline), "the batch must have the baseline of `prepare`"
        ratio, losses = _log_ratio(apply, params, batch, frozen)
        present = jnp.max(jnp.asarray(batch.segments), -1).astype(jnp.float32)
        desirable = jnp.asarray(batch.desirable)
        replies, above = jnp.sum(present), jnp.sign(ratio - batch.baseline)
        right = 0.5 + above * (desirable - 0.5)
        loss = jnp.sum(present * self.loss(ratio, batch.baseline, desirable))
        good, bad, reward = present * desirable, present * (1 - desirable), self.beta * ratio
        metrics = {
            "preference_loss": (loss, replies),
            "accuracy": (jnp.sum(present * right), replies),
            "desirable_reward": (jnp.sum(good * reward), jnp.sum(good)),
            "undesirable_reward": (jnp.sum(bad * reward), jnp.sum(bad)),
            "kl": (jnp.sum(present * batch.baseline), replies),
        }
        return with_parts(loss, replies, losses, metrics)


def _log_ratio(apply: Callable, params: Params, batch: Batch, frozen: Params) -> tuple[Array, object]:
    """r of each reply, float32 [B], and the auxiliary losses of the model's parts."""
    weights = jnp.asarray(batch.weights)
    ours = target_logprobs(apply, params, batch)
    theirs = jax.lax.stop_gradient(target_logprobs(apply, frozen, batch))
    return jnp.sum(weights * (ours.logprobs - theirs.logprobs), -1), ours.losses


def mismatched(batch: Batch) -> Batch:
    """Each prompt with the reply of the sequence before it, the first with the last one's, cut off at T. Sequences of
    padding are left out of the rotation. A sequence has no weights if there is no other."""
    spec = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(batch.tokens).sharding.spec
    everywhere = None if spec is None else PartitionSpec()
    tokens, targets, weights, segments = (
        reshard(jnp.asarray(x), everywhere) for x in (batch.tokens, batch.targets, batch.weights, batch.segments)
    )
    B, T = tokens.shape
    rows, at = jnp.arange(B), jnp.arange(T)
    present = segments[:, 0] > 0
    latest = jax.lax.cummax(jnp.where(present, rows, -1))
    before = jnp.concatenate([jnp.full(1, -1), latest[:-1]])
    owner = jnp.where(before < 0, latest[-1], before)
    start = jnp.argmax(weights > 0, -1)  # the last token of the prompt, whose target is the reply's first
    source = at + (start[owner] - start)[:, None]
    within, source = source < T, jnp.clip(source, 0, T - 1)

    def moved(x: Array) -> Array:
        return jnp.take_along_axis(x[owner], source, 1)

    inside = (at >= start[:, None]) & within & (moved(segments) > 0) & present[:, None]
    new = inside & (moved(weights) > 0) & (owner != rows)[:, None]
    prompt = (at <= start[:, None]) & present[:, None]
    there = inside | prompt
    swapped = Batch(
        tokens=jnp.where(prompt, tokens, jnp.where(inside, moved(tokens), 0)),
        targets=jnp.where(new, moved(targets), 0),
        weights=jnp.where(new, moved(weights), 0.0),
        segments=there.astype(segments.dtype),
        positions=jnp.where(there, at, 0).astype(segments.dtype),
    )
    return jax.tree.map(lambda x: reshard(x, spec), swapped)
