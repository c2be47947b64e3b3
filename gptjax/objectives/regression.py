"""The loss of regressions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Batch, Key, Labelled, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Regression(Objective):
    """Squared error (y - label)^2 of the number y that a model gives each document: a mean over documents."""

    architectures: ClassVar[tuple[str, ...]] = ("regressor",)
    batch_type: ClassVar[type[Batch]] = Labelled
    unit: ClassVar[str] = "text"

    def __call__(self, apply: Callable, params: Params, batch: Labelled, key: Key | None = None) -> Metrics:
        """Metrics per document: "loss", "squared_error" (the loss without the auxiliary losses of the model's parts)
        and "absolute_error".

        apply  a regressor's: `apply({"params": params}, tokens, positions, segments, documents=M) -> (numbers
               [B, M, 1], None)`
        key    None: no dropout
        """
        labels, segments = jnp.asarray(batch.labels, jnp.float32), jnp.asarray(batch.segments)
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (numbers, _), sown = apply(*inputs, documents=labels.shape[1], mutable=["losses"], **rngs)
        counts = (jnp.max(segments, -1, keepdims=True) > jnp.arange(labels.shape[1])).astype(jnp.float32)
        error, total = numbers[..., 0].astype(jnp.float32) - labels, jnp.sum(counts)
        loss = jnp.sum(counts * error**2)
        absolute = jnp.sum(counts * jnp.abs(error))
        return with_parts(loss, total, sown, {"squared_error": (loss, total), "absolute_error": (absolute, total)})
