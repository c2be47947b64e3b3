"""The loss of extractive question answering."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import AnswerSpans, Batch, Key, Metrics, Params

OUTSIDE = -1e30
"""Logit of padding."""


@dataclasses.dataclass(frozen=True)
class SpanExtraction(Objective):
    """Cross entropies of an answer's first token i and last token j, the mean over sequences of
    -(log p_start(i) + log p_end(j)) / 2, with probabilities over all tokens of the sequence (Devlin et al. 2018,
    arXiv:1810.04805, section 4.2). Without an answer both are the first token, BERT's [CLS]."""

    architectures: ClassVar[tuple[str, ...]] = ("span-extractor",)
    batch_type: ClassVar[type[Batch]] = AnswerSpans
    unit: ClassVar[str] = "text"

    def __call__(self, apply: Callable, params: Params, batch: AnswerSpans, key: Key | None = None) -> Metrics:
        """Metrics per sequence: "loss" in nats, "cross_entropy" (the loss without the auxiliary losses of the model's
        parts) and "accuracy", the share whose most likely start and end are both right.

        apply  a span extractor's: `apply({"params": params}, tokens, positions, segments, token_types=types) ->
               (logits [B, T, 2], None)`; a type is 0 for the question, 1 from the passage on
        key    None: no dropout
        """
        labels, positions, inside = (jnp.asarray(x) for x in (batch.labels, batch.positions, batch.segments > 0))
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        types = (inside & (positions >= labels[:, :1])).astype(jnp.int32)
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, token_types=types, mutable=["losses"], **rngs)
        logits = jnp.where(inside[:, :, None], logits.astype(jnp.float32), OUTSIDE)
        answer = inside[:, :, None] & (positions[:, :, None] == labels[:, None, 1:])
        right = jnp.sum(jnp.where(answer, logits, 0.0), axis=1)  # [B, 2], start and end
        counts = (labels[:, 0] >= 0).astype(jnp.float32)
        loss = jnp.sum(counts * jnp.mean(jax.nn.logsumexp(logits, axis=1) - right, -1))
        hits = jnp.sum(counts * jnp.all(right >= jnp.max(logits, axis=1), -1))
        total = jnp.sum(counts)
        return with_parts(loss, total, sown, {"cross_entropy": (loss, total), "accuracy": (hits, total)})
