"""Log-probabilities of a batch's targets: the common part of the losses of replies (preferences, policies)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy, entropy
from gptjax.objectives.parts import logits_of, per_token
from gptjax.types import Array, Batch, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetLogprobs:
    """Log-probabilities of the targets of a batch, from `target_logprobs`."""

    logprobs: Array
    """float32 [B, T], in nats: log-probability of each target, given the tokens before it. Padding has one too."""
    entropy: Array | None
    """float32 [B, T], in nats: entropy of the distribution of each target. None: not asked for."""
    losses: Any
    """Auxiliary losses of the model's parts, for `with_parts`."""


def target_logprobs(
    apply: Callable, params: Params, batch: Batch, temperature: Array | float = 1.0, with_entropy: bool = False
) -> TargetLogprobs:
    """Log-probabilities of `batch.targets` under softmax(logits / temperature), computed in float32, without dropout.

    apply         a decoder's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, V], cache)`
    temperature   float32 [B], one for each sequence, or a number; above 0
    with_entropy  compute the entropy of each distribution, in the same pass
    """
    logits, losses = logits_of(apply, params, batch)
    targets = jnp.asarray(batch.targets)
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32)[..., None], targets.shape)

    def of_tokens(logits: Array, targets: Array, temperatures: Array) -> tuple[Array, ...]:
        logits = logits.astype(jnp.float32) / temperatures[..., None]
        nll, logsumexp = cross_entropy(logits, targets)
        return (-nll, entropy(logits, logsumexp)) if with_entropy else (-nll,)

    logprobs, *entropies = per_token(of_tokens, logits, targets, temperatures)
    return TargetLogprobs(logprobs, entropies[0] if with_entropy else None, losses)
