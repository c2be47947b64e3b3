"""The loss of language models: predict the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.parts import COLLECTIONS, logits_in, weighted_sums, with_parts
from gptjax.protocols import Objective
from gptjax.types import Array, Batch, Key, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross entropy of the targets, weighted by `batch.weights`:

        loss = sum_bt w_bt (nll_bt + z_loss * logsumexp_bt²) / sum_bt w_bt + auxiliary losses of the model's parts

    The z-loss keeps the softmax's denominator near 1, so that logits do not drift (PaLM, arXiv:2204.02311, section 5).
    """

    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator; 1e-4 is usual. 0: no z-loss."""

    chunk: int | None = None
    """Tokens per device of which logits exist at a time. None: all, or as many as suit the device
    (`gptjax.objectives.parts.CHUNK`). Loss and gradient do not depend on it but for rounding."""

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise UserError(f"objective.chunk: got {self.chunk}, must be at least 1")
        if not self.z_loss >= 0:
            raise UserError(f"objective.z_loss: got {self.z_loss}, must be 0 or more; 1e-4 is usual")

    def __call__(self, apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> Metrics:
        """Metrics in nats per token: "loss", "cross_entropy" (the loss without z-loss and auxiliary losses), and each
        auxiliary loss of the model's parts, such as a router's load balance.

        apply  a decoder's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, V], cache)`
        key    None: no dropout
        """
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        logits, sown = logits_in(apply(*inputs, mutable=COLLECTIONS, **rngs))
        weight = jnp.sum(batch.weights)
        loss, plain = weighted_sums(self._of_tokens, logits, batch.weights, batch.targets, chunk=self.chunk)
        return with_parts(loss, weight, sown, {"cross_entropy": (plain, weight)})

    def _of_tokens(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Loss and cross entropy of each token."""
        nll, logsumexp = cross_entropy(logits, targets)
        return nll + self.z_loss * logsumexp**2, nll
