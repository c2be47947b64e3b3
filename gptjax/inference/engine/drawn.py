"""Tokens that a call of the engine's programs has drawn, with their log-probabilities."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.types import Array

ALTERNATIVES = 20
"""Number of most likely tokens that can be returned with each token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens of one call of `decode`: N = `programs.STEPS` (1 + K) of each row at most, with K guesses at a time."""

    tokens: Array
    """int32 [R, N]."""
    logprobs: Array
    """float32 [R, N], under the model itself: before bias, penalties, filters and, unless the row wants it,
    temperature."""
    likely: Array
    """int32 [R, N, ALTERNATIVES], the most likely tokens, where they are wanted."""
    likely_logprobs: Array
    """float32 [R, N, ALTERNATIVES]."""
    count: Array
    """int32 [R], number of tokens."""
    passes: Array
    """int32 [R], number of times that the model ran for them."""

    @classmethod
    def nothing(cls, rows: int, tokens: int) -> Drawn:
        """Room for `tokens` tokens of each row."""
        return cls(
            tokens=jnp.zeros((rows, tokens), jnp.int32),
            logprobs=jnp.zeros((rows, tokens), jnp.float32),
            likely=jnp.zeros((rows, tokens, ALTERNATIVES), jnp.int32),
            likely_logprobs=jnp.zeros((rows, tokens, ALTERNATIVES), jnp.float32),
            count=jnp.zeros(rows, jnp.int32),
            passes=jnp.zeros(rows, jnp.int32),
        )

    def add(self, token: Array, logprobs: Array, wanted: Array, alive: Array) -> Drawn:
        """With one token more, int32 [R], of the rows that are `alive`, bool [R].

        logprobs  float32 [R, V]
        wanted    bool, the most likely tokens are wanted too
        """
        values, ids = most_likely(logprobs, wanted)
        row, place = jnp.arange(len(token)), jnp.where(alive, self.count, self.tokens.shape[1])

        def put(all: Array, one: Array) -> Array:
            return all.at[row, place].set(one, mode="drop")

        return dataclasses.replace(
            self,
            tokens=put(self.tokens, token),
            logprobs=put(self.logprobs, jnp.take_along_axis(logprobs, token[:, None], 1)[:, 0]),
            likely=put(self.likely, ids),
            likely_logprobs=put(self.likely_logprobs, values),
            count=self.count + alive,
        )


def most_likely(logprobs: Array, wanted: Array | bool) -> tuple[Array, Array]:
    """The ALTERNATIVES largest log-probabilities of [..., V], and their tokens; zeros if they are not wanted."""
    *before, vocab = logprobs.shape
    room = [(0, 0)] * len(before) + [(0, max(ALTERNATIVES - vocab, 0))]

    def find(x: Array) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(x, min(ALTERNATIVES, vocab))
        return jnp.pad(values, room, constant_values=-jnp.inf), jnp.pad(ids, room)

    def none(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((*before, ALTERNATIVES)), jnp.zeros((*before, ALTERNATIVES), jnp.int32)

    return jax.lax.cond(wanted, find, none, logprobs)
