"""The loss of embeddings of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Batch, Key, Metrics, Params, SimilarPairs, UserError


@dataclasses.dataclass(frozen=True)
class InfoNCE(Objective):
    """Contrastive loss of pairs of similar texts, with the other pairs of the step as negatives (van den Oord et al.
    2018, arXiv:1807.03748): with vectors a_i and b_i of the texts of pair i,

        -log exp(a_i . b_i / temperature) / sum_j exp(a_i . b_j / temperature)

    A mean over pairs. The pairs of a step are compared with one another, over all devices: a step is never split into
    microbatches, as the loss would be another."""

    temperature: float = 0.05
    """Scale of the cosines."""

    architectures: ClassVar[tuple[str, ...]] = ("embedder",)
    batch_type: ClassVar[type[Batch]] = SimilarPairs
    unit: ClassVar[str] = "pair"
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"objective.temperature: got {self.temperature}, must be more than 0")

    def __call__(self, apply: Callable, params: Params, batch: SimilarPairs, key: Key | None = None) -> Metrics:
        """Metrics per pair: "loss" in nats, "contrastive_loss" (the loss without the auxiliary losses of the model's
        parts) and "accuracy" (share of pairs whose texts are nearest to each other in the step).

        apply  an embedder's: `apply({"params": params}, tokens, positions, segments, documents=2) -> (vectors
               [B, 2, D], None)`
        key    None: no dropout
        """
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
        (vectors, _), sown = apply(*inputs, documents=2, mutable=["losses"], **rngs)
        present = jnp.max(jnp.asarray(batch.segments), -1) == 2
        if not jax.sharding.get_abstract_mesh().empty:  # every device sees all pairs; they are small
            vectors, present = jax.reshard(vectors, PartitionSpec()), jax.reshard(present, PartitionSpec())
        cosines = vectors[:, 0] @ vectors[:, 1].T / self.temperature
        cosines = jnp.where(present, cosines, -1e30)
        nll = jax.nn.logsumexp(cosines, -1) - jnp.diagonal(cosines)
        counts, own = present.astype(jnp.float32), jnp.arange(len(cosines))
        pairs = jnp.sum(counts)
        loss = jnp.sum(jnp.where(present, nll, 0.0))
        right = jnp.sum(counts * (jnp.argmax(cosines, -1) == own))
        return with_parts(loss, pairs, sown, {"contrastive_loss": (loss, pairs), "accuracy": (right, pairs)})
