"""Speculative decoding: guess the next tokens cheaply, and let the model read them all at once (Leviathan et al. 2023,
arXiv:2211.17192).

The model draws a token after every guess, with the key of that position, as it would without guesses. A guess counts if
it is the token that was drawn before it. So a text is the one that is written without speculation, sampled or greedy,
up to the rounding of another program; a good guess saves a pass, and a bad one costs only its part of the pass.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import on_mesh_of, reshard
from gptjax.kernels.cross_entropy import DeferredLogits
from gptjax.nn import Cache, ModelConfig, make_cache, unstack
from gptjax.types import Array, Params, UserError

if TYPE_CHECKING:
    from gptjax.inference.engine.programs import Chunks, Rows


class Draft:
    """Base class of guesses of the next tokens. Hashed by the compiled programs, so its parameters are an argument."""

    tokens: int
    """K, number of guesses at a time."""

    @property
    def weights(self) -> Params:
        """Parameters, of which the methods get those on the device."""
        return {}

    @property
    def sequential(self) -> bool:
        """True if it has recurrent layers: a call has one chunk of a prompt then."""
        return False

    def check(self, config: ModelConfig, vocab: int, context: int) -> None:
        """Raise UserError if it cannot guess for a model of this configuration, with this vocabulary and context."""

    def init_cache(self, model: Any, pages: int, page: int) -> tuple[Any, ...]:
        """Empty cache entries, in as many pages as the model's."""
        return ()

    def read(self, params: Params, rows: Rows, chunks: Chunks) -> tuple[Any, ...]:
        """Cache entries after chunks of prompts, as `programs.prefill` has them."""
        return rows.draft

    def propose(self, params: Params, rows: Rows, pages: Array, limit: Array) -> tuple[Any, Array]:
        """Cache entries after the guesses, and these, int32 [R, K]; -1: none. Arguments as of `programs.decode`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NGram(Draft):
    """Guess that the text goes on as after the last earlier place with the same tokens (prompt lookup decoding, Saxena
    2023). Costs next to nothing, and helps where texts repeat their prompt: summaries, edits, code, extraction."""

    tokens: int = 4
    """Number of guesses at a time."""
    longest: int = 3
    """Number of tokens that should be the same; fewer, down to one, if there is no such place."""

    def __post_init__(self):
        for name in ("tokens", "longest"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, must be at least 1")

    def propose(self, params: Params, rows: Rows, pages: Array, limit: Array) -> tuple[Any, Array]:
        text, last = rows.history, rows.length[:, None]  # the next input token is at `last`
        places = jnp.arange(text.shape[1])
        after = jnp.zeros_like(last)
        for n in range(self.longest, 0, -1):
            same = (places + n <= last) & (last >= n)  # the place must end before `last`
            for k in range(n):
                wanted = jnp.take_along_axis(text, jnp.maximum(last - n + 1 + k, 0), 1)
                same &= jnp.roll(text, -k, 1) == wanted
            after = jnp.where(after > 0, after, jnp.where(same, places + n, 0).max(1, keepdims=True))
        period = jnp.maximum(last + 1 - after, 1)  # a text that repeats itself goes on doing so
        found = jnp.take_along_axis(text, after + jnp.arange(self.tokens) % period, 1)
        return rows.draft, jnp.where(after > 0, found, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel(Draft):
    """Guesses of a smaller model with the same tokenizer. It draws with the model's own keys and settings, so that the
    guesses of a similar distribution are mostly the same tokens."""

    model: Any
    """Its module."""
    params: Params
    """Its parameters."""
    tokens: int = 4
    """Number of guesses at a time."""

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError(f"tokens: got {self.tokens}, must be at least 1")
        with on_mesh_of(self.params):
            object.__setattr__(self, "params", unstack(self.model.config, self.params))
        rules = dataclasses.replace(self.model.rules, batch=None, sequence=None)
        object.__setattr__(self, "model", self.model.clone(rules=rules))

    @property
    def weights(self) -> Params:
        return self.params

    @property
    def sequential(self) -> bool:
        return self.model.config.sequential

    def check(self, config: ModelConfig, vocab: int, context: int) -> None:
        own = self.model.config
        if own.vocab < vocab:
            raise UserError(f"draft: got a model of {own.vocab} tokens, must have the tokenizer's {vocab}")
        if (own.max_positions or context) < context:
            raise UserError(
                f"draft: got a model of {own.max_positions} positions, must have at least {context}, the context"
            )

    def init_cache(self, model: Any, pages: int, page: int) -> tuple[Any, ...]:
        return make_cache(self.model.config, pages, page, self.model.rules, paged=True).layers

    def read(self, params: Params, rows: Rows, chunks: Chunks) -> tuple[Any, ...]:
        tokens, pages = jnp.asarray(chunks.tokens), jnp.asarray(chunks.pages)
        cache = Cache(rows.draft, jnp.asarray(chunks.start), pages.shape[1] * rows.page, pages)
        real = (tokens >= 0).astype(jnp.int32)
        _, cache = self.model.apply({"params": params}, jnp.maximum(tokens, 0), None, real, cache)
        return cast(Cache, cache).layers

    def propose(self, params: Params, rows: Rows, pages: Array, limit: Array) -> tuple[Any, Array]:
        size = pages.shape[1] * rows.page

        def step(k: Array, carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
            layers, token, guesses = carry
            cache = Cache(layers, rows.length + k, size, pages)
            real = (rows.length + k < limit)[:, None].astype(jnp.int32)
            logits, cache = self.model.apply({"params": params}, token[:, None], None, real, cache)
            logits = reshard(logits, self.model.rules(None, None, None))
            token = rows.draw(logits[:, 0].astype(jnp.float32), k, rows.seen)
            return cast(Cache, cache).layers, token, jax.lax.dynamic_update_index_in_dim(guesses, token, k, axis=1)

        # One step more than there are guesses: the last guess must be in the cache too, if it counts.
        guesses = jnp.zeros((len(rows.length), self.tokens + 1), jnp.int32)
        layers, _, guesses = jax.lax.fori_loop(0, self.tokens + 1, step, (rows.draft, rows.token, guesses))
        return layers, guesses[:, :-1]


@dataclasses.dataclass(frozen=True)
class Heads(Draft):
    """Guesses of the model's own extra heads (`MultiTokenConfig`), of which the pass that draws a token is a part. They
    draw with the model's keys and settings too."""

    tokens: int = 1
    """Number of guesses at a time, at most the number of heads."""

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError(f"tokens: got {self.tokens}, must be at least 1")

    def check(self, config: ModelConfig, vocab: int, context: int) -> None:
        from gptjax.nn import MultiTokenConfig

        if not isinstance(config, MultiTokenConfig):
            raise UserError(
                f"draft: got heads with a {type(config).__name__}, must be with a MultiTokenConfig, trained by "
                "objectives.MultiToken; or let NGram() or a smaller model guess"
            )
        if self.tokens > config.ahead:
            raise UserError(f"guesses: got {self.tokens}, must be at most {config.ahead}, the number of extra heads")

    def init_cache(self, model: Any, pages: int, page: int) -> tuple[Any, ...]:
        return model.config.init_ahead_cache(pages, page, model.rules)

    def guess(self, model: Any, rows: Rows, heads: DeferredLogits, new: Array) -> Rows:
        """Rows with guesses after their next input. heads: logits [R, T, A, V] after each input of the last pass, of
        which the first `new` int32 [R] counted."""
        row, place = jnp.arange(len(new)), jnp.arange(self.tokens)
        hidden = heads.hidden[row, jnp.maximum(new - 1, 0), : self.tokens]
        logits = dataclasses.replace(heads, hidden=hidden).logits(model.rules(None, None, "vocab"))
        logits = reshard(logits, model.rules(None, None, None)).astype(jnp.float32)
        guesses = jnp.stack([rows.draw(logits[:, k], k, rows.seen) for k in range(self.tokens)], axis=1)
        places = jnp.where(new[:, None] > 0, rows.length[:, None] + 1 + place, rows.history.shape[1])
        history = rows.history.at[row[:, None], places].set(guesses, mode="drop")
        return dataclasses.replace(rows, history=history)

    def propose(self, params: Params, rows: Rows, pages: Array, limit: Array) -> tuple[Any, Array]:
        places = rows.length[:, None] + 1 + jnp.arange(self.tokens)
        return rows.draft, jnp.take_along_axis(rows.history, places, 1, mode="fill", fill_value=-1)
