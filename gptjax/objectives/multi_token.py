"""The loss of multi-token prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.next_token import NextToken
from gptjax.objectives.parts import deferred_logits, weighted_sums
from gptjax.types import Array, Batch, Key, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class MultiToken(NextToken):
    """`NextToken`, and `ahead` times the mean over the n extra heads of their cross entropy (arXiv:2404.19737):

        loss = NextToken + ahead / n sum_k sum_bt w_b(t+k) nll_k(token_(t+1+k) | token_0 .. token_t) / sum_bt w_bt

    over the t whose document has that many further tokens.
    """

    ahead: float = 0.3
    """Weight of the extra heads: 0.3, later 0.1, in DeepSeek-V3 (arXiv:2412.19437)."""

    def __post_init__(self):
        super().__post_init__()
        if not self.ahead >= 0:
            raise UserError(f"objective.ahead: got {self.ahead}, must be 0 or more; 0.3 is usual")

    def __call__(self, apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> Metrics:
        """Metrics of `NextToken`, and "ahead_1", ...: the cross entropy of each extra head, in nats per token. `apply`
        is a `MultiTokenTransformer`'s."""
        heads = {}

        def first(*args: Any, mutable: list[str], **kwargs: Any) -> Any:
            output, sown = apply(*args, mutable=[*mutable, "ahead"], **kwargs)
            deferred = deferred_logits(sown)
            heads.update({name: deferred.get(name, logits) for name, logits in sown["ahead"].items()})
            return output, {name: tree for name, tree in sown.items() if name != "ahead"}

        metrics = super().__call__(first, params, batch, key)
        targets, segments = jnp.asarray(batch.targets), jnp.asarray(batch.segments)
        loss, weight = metrics["loss"]
        for name, logits in heads.items():
            k = int(name) + 1
            later, after, weights = (_shifted(jnp.asarray(x), k) for x in (targets, segments, batch.weights))
            weights = weights * (after == segments)
            (total,) = weighted_sums(_nll, logits, weights, later, chunk=self.chunk)
            loss = loss + self.ahead / len(heads) * total
            metrics[f"ahead_{k}"] = (total, jnp.sum(weights))
        return metrics | {"loss": (loss, weight)}


def _nll(logits: Array, targets: Array) -> tuple[Array]:
    return cross_entropy(logits, targets)[:1]


def _shifted(x: Array, k: int) -> Array:
    """x[:, k:], with k columns of 0 behind: a gather, because jax slices no axis that is sharded."""
    columns = jnp.arange(k, k + x.shape[1])
    return x.at[:, columns].get(mode="fill", fill_value=0, out_sharding=jax.typeof(x).sharding)
