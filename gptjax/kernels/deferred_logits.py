"""Hidden states and unembedding in the place of logits [B, T, V], which need not exist as a whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.kernels.linear import linear
from gptjax.types import Array


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
