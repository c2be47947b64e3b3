"""The loss of classifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Batch, Key, Labelled, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Cross entropy of the labels of a `Labelled` batch: the mean of -log p(label | text) over its documents."""

    architectures: ClassVar[tuple[str, ...]] = ("classifier",)
    batch_type: ClassVar[type[Batch]] = Labelled
    unit: ClassVar[str] = "text"

    def __call__(self, apply: Callable, params: Params, batch: Labelled, key: Key | None = None) -> Metrics:
        """Metrics: "loss" in nats per document, "cross_entropy" (the loss without the auxiliary losses of the model's
        parts), "accuracy", and each auxiliary loss.

        apply  a classifier's: `apply({"params": params}, tokens, positions, segments, documents=M) -> (logits
               [B, M, C], None)`
        key    None: no dropout
        """
        labels = jnp.asarray(batch.labels)
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, documents=labels.shape[1], mutable=["losses"], **rngs)
        counts = (labels >= 0).astype(jnp.float32)
        nll, _ = cross_entropy(logits, jnp.maximum(labels, 0))
        total = jnp.sum(counts)
        loss = jnp.sum(counts * nll)
        right = jnp.sum(counts * (jnp.argmax(logits, -1) == labels))
        return with_parts(loss, total, sown, {"cross_entropy": (loss, total), "accuracy": (right, total)})
