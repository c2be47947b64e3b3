"""Distillation: the next-token distribution of a small model follows that of a large one, the teacher.

With p the teacher's distribution, q the student's, both at a temperature, and m = beta p + (1 - beta) q:

    beta = 0        KL(p || q)                                      forward: q covers all that p does
    beta = 1        KL(q || p)                                      reverse: q keeps to what p does most
    else            beta KL(p || m) + (1 - beta) KL(q || m)         generalised Jensen-Shannon

The loss is the mean over tokens (Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2023, arXiv:2306.13649, section
3). It is 0 where both models agree. Logits are computed in chunks of tokens, of the teacher too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels.cross_entropy import DeferredLogits, cross_entropy
from gptjax.objectives.parts import logits_of, weighted_sums, with_parts
from gptjax.protocols import Objective, Pretrained
from gptjax.types import Array, Batch, Episodes, FrozenModel, Key, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """Divergence of the student from a teacher with the same tokenizer, on the tokens of a text."""

    teacher: Pretrained
    """Model to learn from, of any architecture that predicts the next token."""
    beta: float = 0.0
    """0: forward KL divergence. 1: reverse KL divergence. Between: generalised Jensen-Shannon divergence."""
    temperature: float = 1.0
    """Both distributions are softmax(logits / temperature). The gradient falls with its square: multiply the learning
    rate or `divergence_weight` by it to compare temperatures."""
    top_k: int | None = None
    """Compare the teacher's `top_k` most probable tokens, and all others as one. None: every token."""
    divergence_weight: float = 1.0
    """Weight of the divergence."""
    cross_entropy_weight: float = 0.0
    """Weight of the cross entropy of the targets, at temperature 1."""
    chunk: int | None = None
    """Tokens per device of which logits exist at a time; see `NextToken`."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"objective.beta: got {self.beta}, must be from 0 (forward) to 1 (reverse)")
        if not self.temperature > 0:
            raise UserError(f"objective.temperature: got {self.temperature}, must be more than 0")
        for field in ("top_k", "chunk"):
            if (count := getattr(self, field)) is not None and count < 1:
                raise UserError(f"objective.{field}: got {count}, must be at least 1")
        for field in ("divergence_weight", "cross_entropy_weight"):
            if not getattr(self, field) >= 0:
                raise UserError(f"objective.{field}: got {getattr(self, field)}, must be 0 or more")

    def __call__(
        self, apply: Callable, params: Params, batch: Batch, key: Key | None = None, *frozen: FrozenModel
    ) -> Metrics:
        """Metrics in nats per token: "loss", "divergence", the student's "cross_entropy" of the targets, and each
        auxiliary loss of its parts.

        frozen  the teacher
        """
        (teacher,) = frozen
        logits, sown = logits_of(apply, params, batch, key)
        target_logits = lax.stop_gradient(logits_of(teacher.module.apply, teacher.params, batch)[0])
        rows, rest = _split(target_logits)

        def of_tokens(logits: Array, targets: Array, rows: Array, rest: Any) -> tuple[Array, Array, Array]:
            theirs = _logits(rows, rest, logits)
            if theirs.shape != logits.shape:
                raise UserError(
                    f"objective.teacher: got a model of {theirs.shape[-1]} token ids, must have the student's "
                    f"{logits.shape[-1]}"
                )
            nll, _ = cross_entropy(logits, targets)
            apart = self.divergence(theirs, logits)
            return self.divergence_weight * apart + self.cross_entropy_weight * nll, apart, nll

        weights = self._weights(batch)
        given = logits, weights, batch.targets, rows
        loss, apart, nll = weighted_sums(of_tokens, *given, constants=(rest,), chunk=self.chunk)
        total = jnp.sum(weights)
        return with_parts(loss, total, sown, {"divergence": (apart, total), "cross_entropy": (nll, total)})

    def divergence(self, teacher: Array, student: Array) -> Array:
        """Divergence of two distributions given as logits [..., V], float32 [...], in nats."""
        scaled = (x.astype(jnp.float32) / self.temperature for x in (teacher, student))
        p, q = (x - jax.nn.logsumexp(x, -1, keepdims=True) for x in scaled)
        if self.top_k is None or self.top_k >= p.shape[-1]:
            return self._summed(p, q, jnp.ones((), bool))
        top = p >= _smallest(p, self.top_k)
        # Finite: where all logits are equal, there are no others.
        rest_p, rest_q = (jax.nn.logsumexp(jnp.where(top, -1e30, x), -1, keepdims=True) for x in (p, q))
        return self._summed(p, q, top) + self._summed(rest_p, rest_q, jnp.ones((), bool))

    def _summed(self, p: Array, q: Array, where: Array) -> Array:
        """Sum over the last axis of the divergence's terms, for log-probabilities p and q."""
        if self.beta == 0:
            terms = jnp.exp(p) * (p - q)
        elif self.beta == 1:
            terms = jnp.exp(q) * (q - p)
        else:
            m = jnp.logaddexp(p + jnp.log(self.beta), q + jnp.log1p(-self.beta))
            terms = self.beta * jnp.exp(p) * (p - m) + (1 - self.beta) * jnp.exp(q) * (q - m)
        return jnp.sum(jnp.where(where, terms, 0.0), -1)

    def _weights(self, batch: Batch) -> Array:
        return jnp.asarray(batch.weights)


@dataclasses.dataclass(frozen=True)
class OnPolicyDistillation(Distillation):
    """`Distillation` on replies that the student wrote, with the reverse KL divergence unless told otherwise: the
    student learns from the teacher where its own texts lead it (Agarwal et al. 2023, arXiv:2306.13649). There is no
    gradient through the choice of the tokens. Rewards are not read."""

    batch_type: ClassVar[type[Batch]] = Episodes

    beta: float = 1.0
    """0: forward KL divergence. 1: reverse KL divergence. Between: generalised Jensen-Shannon divergence."""

    def _weights(self, batch: Any) -> Array:
        return jnp.asarray(batch.weights) * (jnp.asarray(batch.groups) >= 0)[:, None]


def _split(logits: Array | DeferredLogits) -> tuple[Array, Any]:
    """The rows of each token, [B, T, *], and the rest."""
    if isinstance(logits, DeferredLogits):
        return logits.hidden, dataclasses.replace(logits, hidden=None)
    return logits, None


def _logits(rows: Array, rest: Any, like: Array) -> Array:
    """Logits of these rows, sharded as `like`."""
    if rest is None:
        return rows
    mesh = jax.sharding.get_abstract_mesh()
    return dataclasses.replace(rest, hidden=rows).logits(None if mesh.empty else jax.typeof(like).sharding.spec)


def _smallest(x: Array, count: int) -> Array:
    """The `count`-th largest value along the last axis, [..., 1]."""
    if not jax.sharding.get_abstract_mesh().empty:  # jax refuses to sort along a sharded vocabulary
        x = jax.reshard(x, jax.sharding.PartitionSpec(*jax.typeof(x).sharding.spec[:-1], None))
    return lax.top_k(x, count)[0][..., -1:]
