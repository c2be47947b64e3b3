"""Cross entropy of logits against token ids, also where the vocabulary is sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.types import Array


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Negative log-likelihood of each target, and the log of the softmax's denominator.

        logsumexp = log sum_v exp(logits_v)        nll = logsumexp - logits_target

    logits [..., V], any float dtype: computed in float32; targets [...] integers in 0..V-1. Returns two float32 [...],
    in nats. Stable for logits of any finite size.
    """
    logits = logits.astype(jnp.float32)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    # A mask and a sum, not a gather: a gather along a sharded vocabulary is refused. No VJP of its own either: autodiff
    # reuses the exponentials of the forward pass; softmax - onehot written out takes a second round of them.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    at_target = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1)
    return logsumexp - at_target, logsumexp
