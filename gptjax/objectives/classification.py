"""The loss of classifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Batch, Key, Labelled, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Cross entropy of the labels of a `Labelled` batch: the mean of -log p(label | text) over its documents."""

    label_smoothing: float = 0.0
    """Share e of the target that is spread over all C classes (Szegedy et al. 2016, arXiv:1512.00567):
    (1 - e) -log p(label) + e / C sum_c -log p(c), in training only, so that validation losses compare."""

    architectures: ClassVar[tuple[str, ...]] = ("classifier",)
    batch_type: ClassVar[type[Batch]] = Labelled
    unit: ClassVar[str] = "text"

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing: got {self.label_smoothing}, must be from 0 to below 1")

    def __call__(self, apply: Callable, params: Params, batch: Labelled, key: Key | None = None) -> Metrics:
        """Metrics: "loss" in nats per document, "cross_entropy" (the loss without the auxiliary losses of the model's
        parts), "accuracy", and each auxiliary loss.

        apply  a classifier's: `apply({"params": params}, tokens, positions, segments, documents=M) -> (logits
               [B, M, C], None)`
        key    None: no dropout, and no label smoothing
        """
        labels = jnp.asarray(batch.labels)
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, documents=labels.shape[1], mutable=["losses"], **rngs)
        counts = (labels >= 0).astype(jnp.float32)
        nll, logsumexp = cross_entropy(logits, jnp.maximum(labels, 0))
        total = jnp.sum(counts)
        plain = loss = jnp.sum(counts * nll)
        if self.label_smoothing and key is not None:
            spread = logsumexp - jnp.mean(logits.astype(jnp.float32), -1)  # the mean of -log p over the classes
            loss = (1 - self.label_smoothing) * plain + self.label_smoothing * jnp.sum(counts * spread)
        right = jnp.sum(counts * (jnp.argmax(logits, -1) == labels))
        return with_parts(loss, total, sown, {"cross_entropy": (plain, total), "accuracy": (right, total)})
