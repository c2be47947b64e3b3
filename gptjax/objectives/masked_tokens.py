"""The loss of encoders: predict masked tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives.parts import with_parts
from gptjax.protocols import Objective
from gptjax.types import Array, Batch, Key, Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class MaskedTokens(Objective):
    """Masked language modelling as in BERT (arXiv:1810.04805, section 3.1): each token is selected with probability
    `mask_probability`. Of the selected tokens, 80 % become `mask_token`, 10 % a random token, and 10 % stay; the loss
    is the mean of

        -log p(token | masked text)        over the selected tokens

    Tokens are selected anew at every step. Without a key, as in evaluation, the selection is always the same.
    """

    architectures: ClassVar[tuple[str, ...]] = ("encoder",)

    mask_token: int
    """Id of the mask token."""
    vocab: int
    """Random tokens have the ids 0 to vocab - 1."""
    mask_probability: float = 0.15
    """Probability that a token is selected."""
    unmasked_ids: tuple[int, ...] = ()
    """Ids that are never selected: special tokens."""

    def __post_init__(self):
        if not 0 < self.mask_probability <= 1:
            raise UserError(
                f"objective.mask_probability: got {self.mask_probability}, must be above 0 and at most 1; 0.15 is usual"
            )
        if self.vocab < 1:
            raise UserError(f"objective.vocab: got {self.vocab}, must be at least 1")
        if self.mask_token < 0:
            raise UserError(f"objective.mask_token: got {self.mask_token}, must be a token id")

    def __call__(self, apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> Metrics:
        """Metrics: "loss" in nats per selected token, "cross_entropy" (the loss without the auxiliary losses of the
        model's parts), "accuracy" over the selected tokens, and each auxiliary loss.

        apply  an encoder's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, V], None)`
        batch  tokens, segments and positions are read
        key    None: no dropout
        """
        choice, dropout = jax.random.split(jax.random.key(0) if key is None else key)
        rngs = {} if key is None else {"rngs": {"dropout": dropout}}
        tokens = jnp.asarray(batch.tokens)
        masked, selected = self.mask(tokens, batch.segments != 0, choice)
        inputs = ({"params": params}, masked, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, mutable=["losses"], **rngs)
        nll, _ = cross_entropy(logits, tokens)
        weights = selected.astype(jnp.float32)
        total = jnp.sum(weights)
        correct = jnp.sum(weights * (jnp.argmax(logits, -1) == tokens))
        loss = jnp.sum(weights * nll)
        return with_parts(loss, total, sown, {"cross_entropy": (loss, total), "accuracy": (correct, total)})

    def mask(self, tokens: Array, real: Array, key: Key) -> tuple[Array, Array]:
        """Mask tokens int32 [B, T], of which `real` bool [B, T] are not padding: (masked tokens, selected bool [B,
        T])."""
        selected, action, other = jax.random.split(key, 3)
        eligible = real
        for token in self.unmasked_ids:
            eligible = eligible & (tokens != token)
        draws = (
            jax.random.bernoulli(selected, self.mask_probability, tokens.shape),
            jax.random.uniform(action, tokens.shape),
            jax.random.randint(other, tokens.shape, 0, self.vocab, tokens.dtype),
        )
        if not jax.sharding.get_abstract_mesh().empty:
            draws = jax.reshard(draws, jax.typeof(tokens).sharding.spec)
        selected, action, other = draws
        selected = eligible & selected
        new = jnp.where(action < 0.8, self.mask_token, jnp.where(action < 0.9, other, tokens))
        return jnp.where(selected, new, tokens), selected
