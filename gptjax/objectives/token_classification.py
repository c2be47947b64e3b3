"""The loss of classifiers of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Batch, Key, Metrics, Params, TokenLabelled


@dataclasses.dataclass(frozen=True)
class TokenClassification(Objective):
    """Cross entropy of the labels of a `TokenLabelled` batch: the mean of -log p(label | text) over the tokens that
    have one. With labels at the ends of steps it trains a process reward model (Lightman et al. 2023,
    arXiv:2305.20050)."""

    architectures: ClassVar[tuple[str, ...]] = ("token-classifier",)
    batch_type: ClassVar[type[Batch]] = TokenLabelled

    def __call__(self, apply: Callable, params: Params, batch: TokenLabelled, key: Key | None = None) -> Metrics:
        """Metrics per labelled token: "loss" in nats, "cross_entropy" (the loss without the auxiliary losses of the
        model's parts) and "accuracy".

        apply  a token classifier's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, C],
               None)`
        key    None: no dropout
        """
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, mutable=["losses"], **rngs)
        weights, labels = jnp.asarray(batch.weights), jnp.asarray(batch.targets)
        nll, _ = cross_entropy(logits, labels)
        loss, total = jnp.sum(weights * nll), jnp.sum(weights)
        right = jnp.sum(weights * (jnp.argmax(logits, -1) == labels))
        return with_parts(loss, total, sown, {"cross_entropy": (loss, total), "accuracy": (right, total)})
