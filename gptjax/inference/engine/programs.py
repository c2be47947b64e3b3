"""The engine's compiled programs: rows on the device, and the two steps that change them.

There is one shape of each, so nothing is compiled while the engine runs, and a text is computed by the same programs
at the same places whatever else the engine does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.inference.sampling import Sampling, SamplingRows, Seen, sample, unseen
from gptjax.nn import Cache, make_cache
from gptjax.types import Array, Key, Params

STEPS = 8
"""Maximum number of tokens per row and call of `decode`."""
ALTERNATIVES = 20
"""Number of most likely tokens that can be returned with each token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R rows on the device. A row is idle, or decodes a text."""

    layers: tuple[Any, ...]
    """Cache entries, in pages that rows share."""
    length: Array
    """int32 [R], number of tokens in the cache."""
    token: Array
    """int32 [R], next input token."""
    keys: Key
    """[R], random keys of the texts."""
    settings: SamplingRows
    """[R]."""
    seen: Seen
    """[R, V], tokens that penalties apply to."""
    bias: Array
    """float32 [R, V], added to the logits before sampling."""
    biased: Array
    """bool [R]: rows with a bias."""
    compares: Array
    """bool [R]: rows that want the most likely tokens too."""
    ends: Array
    """uint32 [R, W], set of the tokens that end the text; see `members`."""
    earliest: Array
    """int32 [R]: none of them is drawn before this many tokens are in the cache."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens of one call of `decode`; a row's number of them is known to the caller."""

    tokens: Array
    """int32 [R, STEPS]."""
    logprobs: Array
    """float32 [R, STEPS], under the model itself: before bias, penalties, temperature and filters."""
    likely: Array
    """int32 [R, STEPS, ALTERNATIVES], the most likely tokens, where they are wanted."""
    likely_logprobs: Array
    """float32 [R, STEPS, ALTERNATIVES]."""


def idle(config: Any, rows: int, pages: int, page: int, vocab: int) -> Rows:
    """Rows without texts, and an empty pool of pages, the last of them nobody's. vocab: tokens from this one on are
    never sampled."""
    cache = make_cache(config, pages, page)
    return Rows(
        layers=cache.layers,
        length=jnp.zeros(rows, jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        keys=jax.random.split(jax.random.key(0), rows),
        settings=jax.tree.map(jnp.asarray, SamplingRows.of([Sampling()] * rows)),
        seen=unseen(rows, vocab),
        bias=jnp.zeros((rows, vocab), jnp.float32),
        biased=jnp.zeros(rows, bool),
        compares=jnp.zeros(rows, bool),
        ends=jnp.zeros((rows, -(-vocab // 32)), jnp.uint32),
        earliest=jnp.zeros(rows, jnp.int32),
    )


@functools.partial(jax.jit, donate_argnames="rows")
def admit(
    rows: Rows,
    row: Array | int,
    token: Array | int,
    length: Array | int,
    seed: Array | np.ndarray,
    choice: Array | int,
    settings: SamplingRows,
    prompt: Array | np.ndarray,
    bias: Array | np.ndarray,
    compares: Array | bool,
    ends: Array | np.ndarray,
    earliest: Array | int,
) -> Rows:
    """Put a text into a row.

    token     the last token of its prompt; the `length` ones before are in the cache or will be before it decodes
    seed      uint32, with `choice` the key of all its draws
    settings  of one row
    prompt    bool [V], tokens of the prompt
    bias      float32 [V]
    ends      uint32 [W], set of the tokens that end the text
    earliest  number of tokens in the cache before one of them may be drawn
    """

    def put(all: Array, one: Any) -> Array:
        return all.at[row].set(one)

    key = jax.random.fold_in(jax.random.key(seed), choice)
    return dataclasses.replace(
        rows,
        length=put(rows.length, length),
        token=put(rows.token, token),
        keys=put(rows.keys, key),
        settings=jax.tree.map(lambda all, one: put(all, one[0]), rows.settings, settings),
        seen=Seen(put(rows.seen.prompt, prompt), put(rows.seen.counts, 0)),
        bias=put(rows.bias, bias),
        biased=put(rows.biased, (bias != 0).any()),
        compares=put(rows.compares, compares),
        ends=put(rows.ends, ends),
        earliest=put(rows.earliest, earliest),
    )


def without(logits: Array, rows: Array, tokens: Array) -> Array:
    """logits [R, V], minus infinity for the set uint32 [R, W] of tokens of each of the rows bool [R]."""

    def remove(x: Array) -> Array:
        return jnp.where(rows[:, None] & members(tokens, x.shape[1]), -jnp.inf, x)

    return jax.lax.cond(rows.any(), remove, lambda x: x, logits)


def members(tokens: Array, vocab: int) -> Array:
    """bool [R, V] of sets of tokens: token i is bit i % 32 of word i // 32, uint32 [R, W]."""
    bits = (tokens[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (bits > 0).reshape(len(tokens), -1)[:, :vocab]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="rows")
def prefill(
    model: Any, params: Params, rows: Rows, tokens: Array | np.ndarray, start: Array | int, pages: Array | np.ndarray
) -> Rows:
    """Read a page of a prompt into the pool.

    tokens  int32 [page], -1 for padding at the end
    start   position of the first
    pages   int32 [M], the text's pages
    """
    tokens, pages = jnp.asarray(tokens)[None], jnp.asarray(pages)[None]
    cache = Cache(rows.layers, jnp.asarray(start)[None], pages.shape[1] * tokens.shape[1], pages)
    real = (tokens >= 0).astype(jnp.int32)
    # These logits are unused, so the compiler drops the head, the largest matrix product.
    _, cache = model.apply({"params": params}, jnp.maximum(tokens, 0), None, real, cache)
    return dataclasses.replace(rows, layers=cast(Cache, cache).layers)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="rows")
def score(
    model: Any,
    params: Params,
    rows: Rows,
    tokens: Array | np.ndarray,
    start: Array | int,
    pages: Array | np.ndarray,
    following: Array | np.ndarray,
    compares: Array | bool,
) -> tuple[Rows, Drawn]:
    """As `prefill`, with the log-probabilities of the tokens that follow each, int32 [page]: a `Drawn` of one row.
    compares: the most likely tokens are wanted too."""
    vocab = rows.bias.shape[1]
    cache = Cache(rows.layers, jnp.asarray(start)[None], len(pages) * len(tokens), jnp.asarray(pages)[None])
    tokens, following = jnp.asarray(tokens)[None], jnp.asarray(following)[None]
    real = (tokens >= 0).astype(jnp.int32)
    logits, cache = model.apply({"params": params}, jnp.maximum(tokens, 0), None, real, cache)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))[..., :vocab]
    values, ids = _most_likely(logprobs, compares)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(following, 0)[..., None], -1)[..., 0]
    return dataclasses.replace(rows, layers=cast(Cache, cache).layers), Drawn(following, chosen, ids, values)


def _most_likely(logprobs: Array, wanted: Array | bool) -> tuple[Array, Array]:
    """The ALTERNATIVES largest log-probabilities of [..., V], and their tokens; zeros if they are not wanted."""
    *before, vocab = logprobs.shape
    room = [(0, 0)] * len(before) + [(0, max(ALTERNATIVES - vocab, 0))]

    def find(x: Array) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(x, min(ALTERNATIVES, vocab))
        return jnp.pad(values, room, constant_values=-jnp.inf), jnp.pad(ids, room)

    def none(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((*before, ALTERNATIVES)), jnp.zeros((*before, ALTERNATIVES), jnp.int32)

    return jax.lax.cond(wanted, find, none, logprobs)


@functools.partial(jax.jit, static_argnames=("model", "page"), donate_argnames="rows")
def decode(
    model: Any,
    params: Params,
    rows: Rows,
    pages: Array | np.ndarray,
    limit: Array | np.ndarray,
    replayed: Array | np.ndarray,
    allowed: Array,
    held: Array,
    steps: Array | int,
    page: int,
) -> tuple[Rows, Drawn]:
    """Decode up to `steps` tokens of every row.

    pages     int32 [R, M], pages of each row
    limit     int32 [R]: a row is idle once it has this many tokens in the cache
    replayed  int32 [R, STEPS]: tokens to take in place of drawn ones; -1: draw
    allowed   uint32 [R, W], set of tokens of which the rows in `held` draw
    held      bool [R]
    page      number of slots of a page
    """
    pages, limit, replayed = jnp.asarray(pages), jnp.asarray(limit), jnp.asarray(replayed)
    R, vocab = rows.bias.shape
    size = pages.shape[1] * page

    def step(i: Array, carry: tuple[Rows, Drawn]) -> tuple[Rows, Drawn]:
        rows, drawn = carry
        active = rows.length < limit
        cache = Cache(rows.layers, rows.length, size, pages)
        real = active[:, None].astype(jnp.int32)
        logits, cache = model.apply({"params": params}, rows.token[:, None], None, real, cache)
        logits = logits[:, 0].astype(jnp.float32)
        total, logits = jax.nn.logsumexp(logits, axis=-1, keepdims=True), logits[:, :vocab]
        changed = jax.lax.cond(rows.biased.any(), lambda x: x + rows.bias, lambda x: x, logits)
        changed = without(changed, active & (rows.length < rows.earliest), rows.ends)
        changed = without(changed, held, ~allowed)
        # The key of a draw depends on the text and the position alone.
        keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.length)
        token = sample(changed, keys, rows.settings, rows.seen)
        forced = jax.lax.dynamic_index_in_dim(replayed, i, axis=1, keepdims=False)
        token = jnp.where(forced >= 0, forced, token)

        values, ids = _most_likely(logits - total, rows.compares.any())

        def put(all: Array, one: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(all, one, i, axis=1)

        logprob = jnp.take_along_axis(logits - total, token[:, None], 1)[:, 0]
        drawn = Drawn(
            put(drawn.tokens, token),
            put(drawn.logprobs, logprob),
            put(drawn.likely, ids),
            put(drawn.likely_logprobs, values),
        )
        cache = cast(Cache, cache)
        rows = dataclasses.replace(
            rows,
            layers=cache.layers,
            length=cache.length,
            token=jnp.where(active, token, rows.token),
            seen=rows.seen.add(jnp.where(active, token, vocab)),
        )
        return rows, drawn

    nothing = Drawn(
        jnp.zeros((R, STEPS), jnp.int32),
        jnp.zeros((R, STEPS), jnp.float32),
        jnp.zeros((R, STEPS, ALTERNATIVES), jnp.int32),
        jnp.zeros((R, STEPS, ALTERNATIVES), jnp.float32),
    )
    return jax.lax.fori_loop(0, steps, step, (rows, nothing))
