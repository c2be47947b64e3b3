"""The loss of encoders: fill in tokens that were hidden."""

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
    """The masked language model of BERT (arXiv:1810.04805, section 3.1): each token is chosen with probability `share`.
    Of the chosen, 80 % become `mask_token`, 10 % a random one, and 10 % stay as they are; the loss is the mean of

        -log p(token | text with the chosen ones hidden)        over the chosen tokens

    They are chosen anew at every step. Without a key, as in evaluation, the choice is the same each time.
    """

    architectures: ClassVar[tuple[str, ...]] = ("encoder",)

    mask_token: int
    """The id that stands for a hidden token."""
    vocab: int
    """Random tokens are of the ids 0 to vocab - 1."""
    share: float = 0.15
    """How likely a token is to be chosen."""
    never: tuple[int, ...] = ()
    """Ids that are never chosen: special tokens."""

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"objective.share: got {self.share}, must be above 0 and at most 1; 0.15 is usual")
        if self.vocab < 1:
            raise UserError(f"objective.vocab: got {self.vocab}, must be at least 1")
        if self.mask_token < 0:
            raise UserError(f"objective.mask_token: got {self.mask_token}, must be a token id")

    def __call__(self, apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> Metrics:
        """`apply` is an encoder's: `apply({"params": params}, tokens, positions, segments) -> (logits [B,T,V], None)`.
        Reads the batch's tokens, segments and positions. Metrics: "loss", nats a chosen token; "accuracy", the share of
        them that the model finds likeliest; and what parts of the model add to the loss (`Weight.loss`)."""
        choice, dropout = jax.random.split(jax.random.key(0) if key is None else key)
        rngs = {} if key is None else {"rngs": {"dropout": dropout}}
        tokens = jnp.asarray(batch.tokens)
        hidden, chosen = self.hide(tokens, batch.segments != 0, choice)
        inputs = ({"params": params}, hidden, batch.positions, batch.segments)
        (logits, _), sown = apply(*inputs, mutable=["losses"], **rngs)
        nll, _ = cross_entropy(logits, tokens)
        weights = chosen.astype(jnp.float32)
        total = jnp.sum(weights)
        found = jnp.sum(weights * (jnp.argmax(logits, -1) == tokens))
        loss = jnp.sum(weights * nll)
        return with_parts(loss, total, sown, {"cross_entropy": (loss, total), "accuracy": (found, total)})

    def hide(self, tokens: Array, real: Array, key: Key) -> tuple[Array, Array]:
        """tokens int32 [B, T], real bool [B, T] -> the tokens with the chosen ones hidden, and bool [B, T], which."""
        chosen, how, other = jax.random.split(key, 3)
        may = real
        for token in self.never:
            may = may & (tokens != token)
        draws = (
            jax.random.bernoulli(chosen, self.share, tokens.shape),
            jax.random.uniform(how, tokens.shape),
            jax.random.randint(other, tokens.shape, 0, self.vocab, tokens.dtype),
        )
        if not jax.sharding.get_abstract_mesh().empty:
            draws = jax.reshard(draws, jax.typeof(tokens).sharding.spec)
        chosen, how, other = draws
        chosen = may & chosen
        new = jnp.where(how < 0.8, self.mask_token, jnp.where(how < 0.9, other, tokens))
        return jnp.where(chosen, new, tokens), chosen
