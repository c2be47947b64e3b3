"""The loss of multi-token prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.next_token import NextToken
from gptjax.types import Batch, Key, Metrics, Params, UserError


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
            heads.update(sown["ahead"])
            return output, {name: tree for name, tree in sown.items() if name != "ahead"}

        metrics = super().__call__(first, params, batch, key)
        targets, segments = jnp.asarray(batch.targets), jnp.asarray(batch.segments)
        loss, weight = metrics["loss"]
        for name, logits in heads.items():
            k = int(name) + 1
            nll, _ = cross_entropy(logits[:, :-k], targets[:, k:])
            weights = batch.weights[:, k:] * (segments[:, k:] == segments[:, :-k])
            total = jnp.sum(weights * nll)
            loss = loss + self.ahead / len(heads) * total
            metrics[f"ahead_{k}"] = (total, jnp.sum(weights))
        return metrics | {"loss": (loss, weight)}
