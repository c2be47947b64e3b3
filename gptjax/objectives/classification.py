"""The loss of classifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.parts import with_parts
from gptjax.types import Batch, Key, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross entropy of the labels of a `Labelled` batch: the mean of -log p(label | text) over its documents."""

    def __call__(self, apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> Metrics:
        """`apply` is a classifier's: `apply({"params": params}, tokens, positions, segments, documents=M) -> (logits
        [B, M, C], None)`. Without a key there is no dropout. Metrics: "loss", nats a document; "cross_entropy", that
        without what parts of the model add (`Weight.loss`); "accuracy"; and what those parts add."""
        labels = jnp.asarray(batch.labels)  # pyright: ignore[reportAttributeAccessIssue] (it is a `Labelled`)
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, documents=labels.shape[1], mutable=["losses"], **rngs)
        counts = (labels >= 0).astype(jnp.float32)
        nll, _ = cross_entropy(logits, jnp.maximum(labels, 0))
        total = jnp.sum(counts)
        loss = jnp.sum(counts * nll)
        right = jnp.sum(counts * (jnp.argmax(logits, -1) == labels))
        return with_parts(loss, total, sown, {"cross_entropy": (loss, total), "accuracy": (right, total)})
