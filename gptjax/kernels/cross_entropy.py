"""Cross entropy of logits against token ids, also with a sharded vocabulary, and logits that are not yet computed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.kernels.linear import linear
from gptjax.types import Array


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Negative log-likelihood of each target, and the log of the softmax's denominator (logsumexp).

        logsumexp = log sum_v exp(logits_v)        nll = logsumexp - logits_target

    logits [..., V] of any float dtype, computed in float32; targets [...] integers in 0..V-1. Returns two float32
    [...], in nats. Stable for logits of any finite size.
    """
    logits = logits.astype(jnp.float32)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    # A mask and a sum, because jax refuses a gather along a sharded vocabulary. No custom VJP: autodiff reuses the
    # exponentials of the forward pass, an explicit softmax - onehot would compute them again.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    at_target = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1)
    return logsumexp - at_target, logsumexp


def entropy(logits: Array, logsumexp: Array) -> Array:
    """Entropy of softmax(logits) in nats, - sum_v p_v log p_v: logits [..., V] and their logsumexp [...] -> float32
    [...]."""
    logprobs = logits.astype(jnp.float32) - logsumexp[..., None]
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeferredLogits:
    """softcap(scale hidden unembedding + bias), not yet computed."""

    hidden: Array
    """[B, T, D], in the compute dtype."""
    unembedding: Array
    """[D, V]."""
    bias: Array | None = None
    """[V]. None: 0."""
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    """Factor of the product."""
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    """c in c tanh(logits / c). None: no cap."""

    def logits(self, out_sharding: PartitionSpec | None = None) -> Array:
        """[..., V], in the compute dtype."""
        logits = linear(self.hidden, self.unembedding, out_sharding)
        logits = logits * self.scale if self.scale != 1 else logits
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits if self.bias is None else logits + self.bias


Logits = Array | DeferredLogits
"""Logits [B, T, V], or what they are computed from."""
