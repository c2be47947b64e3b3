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

from gptjax.distributed.sharding import reshard
from gptjax.inference.engine.drawn import Drawn, most_likely
from gptjax.inference.engine.speculation import Draft, Heads
from gptjax.inference.sampling import Sampling, SamplingRows, Seen, sample, unseen
from gptjax.kernels.adapted import with_rows
from gptjax.kernels.cross_entropy import DeferredLogits
from gptjax.nn import Cache, make_cache
from gptjax.protocols import Module
from gptjax.types import Array, Key, Params

STEPS = 8
"""Maximum number of tokens per row and call of `decode`."""
CHUNK = 16
"""T, maximum number of tokens of a chunk of a prompt; with recurrent layers it is a page."""
CHUNKS = 4
"""C, number of chunks per call of `prefill`: of one prompt or of several; with recurrent layers 1."""
READS = 4
"""Maximum number of calls of `prefill` between two calls of `decode`, which takes as long for one row as for all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Models:
    """A model, and the draft that guesses for it."""

    model: Module = dataclasses.field(metadata={"static": True})
    """Its module."""
    params: Params
    """Its parameters, unstacked."""
    draft: Draft | None = dataclasses.field(default=None, metadata={"static": True})
    """None: no speculation."""
    draft_params: Params = dataclasses.field(default_factory=dict)
    """Parameters of the draft."""


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
    history: Array
    """int32 [R, S], tokens of prompt and text up to `token`, and the guesses of `Heads` after it, for speculation;
    -1: none. Without speculation S is 0."""
    draft: tuple[Any, ...]
    """Cache entries of the draft, in the same pages."""
    adapter: Array
    """int32 [R], number of the adapter of each row; 0: none."""
    scale: Array
    """float32 [R], factor of the logits in the log-probabilities."""
    page: int = dataclasses.field(metadata={"static": True})
    """Number of slots of a page."""

    def draw(self, logits: Array, ahead: Array | int, seen: Seen) -> Array:
        """The token int32 [R] after float32 logits [R, V'] of a position `ahead` of the next one."""
        position, logits = self.length + ahead, logits[:, : self.bias.shape[1]]
        changed = jax.lax.cond(self.biased.any(), lambda x: x + self.bias, lambda x: x, logits)
        changed = without(changed, position < self.earliest, self.ends)
        # The key of a draw depends on the text and the position alone.
        return sample(changed, jax.vmap(jax.random.fold_in)(self.keys, position), self.settings, seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tokens of C chunks of prompts, which are read at the same time. Attention writes the keys and values of all
    before it reads any, so that chunks may follow one another in one prompt; with recurrent layers C is 1."""

    tokens: Array | np.ndarray
    """int32 [C, T], -1 for padding at the end; a chunk may be empty."""
    start: Array | np.ndarray
    """int32 [C], position of the first."""
    pages: Array | np.ndarray
    """int32 [C, M], pages of the chunk's text."""
    adapter: Array | np.ndarray
    """int32 [C], number of the text's adapter."""


def idle(models: Models, rows: int, pages: int, page: int, vocab: int, context: int = 0) -> Rows:
    """Rows without texts, and an empty pool of pages, the last of them nobody's.

    vocab    tokens from this one on are never sampled
    context  maximum number of tokens of a row, for the draft
    """
    draft, cache = models.draft, make_cache(models.model.config, pages, page, models.model.rules, paged=True)
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
        history=jnp.zeros((rows, 0 if draft is None else context), jnp.int32),
        draft=() if draft is None else draft.init_cache(models.model, pages, page),
        adapter=jnp.zeros(rows, jnp.int32),
        scale=jnp.ones(rows, jnp.float32),
        page=page,
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
    history: Array | np.ndarray,
    adapter: Array | int,
    scale: Array | float,
) -> Rows:
    """Put a text into a row.

    token     the last token of its prompt; the `length` ones before are in the cache or will be before it decodes
    seed      uint32, with `choice` the key of all its draws
    settings  of one row
    prompt    bool [V], tokens of the prompt
    bias      float32 [V]
    ends      uint32 [W], set of the tokens that end the text
    earliest  number of tokens in the cache before one of them may be drawn
    history   int32 [S], the prompt
    adapter   number of its adapter
    scale     factor of the logits in the log-probabilities
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
        history=put(rows.history, history),
        adapter=put(rows.adapter, adapter),
        scale=put(rows.scale, scale),
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


@functools.partial(jax.jit, donate_argnames="rows")
def prefill(models: Models, rows: Rows, chunks: Chunks) -> Rows:
    """Read chunks of prompts into the pool."""
    # These logits are unused, so the compiler drops the head, the largest matrix product.
    return _read(models, rows, chunks)[0]


def _read(models: Models, rows: Rows, chunks: Chunks) -> tuple[Rows, Array]:
    """`prefill`, and the logits [C, T, V]."""
    tokens, start, pages = jnp.asarray(chunks.tokens), jnp.asarray(chunks.start), jnp.asarray(chunks.pages)
    real, params = (tokens >= 0).astype(jnp.int32), with_rows(models.params, jnp.asarray(chunks.adapter))
    rows, logits, _ = _forward(models, params, rows, tokens, real, start, pages)
    if models.draft is not None:
        rows = dataclasses.replace(rows, draft=models.draft.read(models.draft_params, rows, chunks))
    return rows, logits


def _forward(
    models: Models, params: Params, rows: Rows, tokens: Array, real: Array, start: Array, pages: Array
) -> tuple[Rows, Array, DeferredLogits | None]:
    """Read tokens int32 [B, T] of texts after the `start` [B] that are in the cache. real: 0 for padding, at the end.

    Returns rows with the new cache entries, logits [B, T, V], and with `Heads` those of the model's extra heads."""
    cache, heads = Cache(rows.layers, start, pages.shape[1] * rows.page, pages), isinstance(models.draft, Heads)
    options = {"ahead": rows.draft} if heads else {}
    output, cache = models.model.apply({"params": params}, jnp.maximum(tokens, 0), None, real, cache, **options)
    logits, ahead, draft = output if heads else (output, None, rows.draft)
    return dataclasses.replace(rows, layers=cast(Cache, cache).layers, draft=draft), logits, ahead


@functools.partial(jax.jit, donate_argnames="rows")
def copy(rows: Rows, pages: Array | np.ndarray, count: Array | int) -> Rows:
    """Copy the first `count` pages of int32 [C, 2], each to the second one beside it."""

    def one(i: Array, pool: Array) -> Array:
        source, target = jnp.asarray(pages)[i]
        return jax.lax.dynamic_update_index_in_dim(pool, pool[source], target, 0)

    layers, draft = jax.lax.fori_loop(
        0, count, lambda i, pools: jax.tree.map(functools.partial(one, i), pools), (rows.layers, rows.draft)
    )
    return dataclasses.replace(rows, layers=layers, draft=draft)


@functools.partial(jax.jit, donate_argnames="rows")
def score(
    models: Models, rows: Rows, chunks: Chunks, following: Array | np.ndarray, compares: Array | bool
) -> tuple[Rows, Drawn]:
    """As `prefill`, of chunks that follow one another, with the log-probabilities of the tokens that follow each token,
    int32 [C T]: a `Drawn` of one row. compares: the most likely tokens are wanted too."""
    rows, logits = _read(models, rows, chunks)
    logits = reshard(logits, models.model.rules(None, None, None))
    logits, following = logits.reshape(1, -1, logits.shape[-1]), jnp.asarray(following)[None]
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))[..., : rows.bias.shape[1]]
    values, ids = most_likely(logprobs, compares)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(following, 0)[..., None], -1)[..., 0]
    count = (following >= 0).sum(1)
    return rows, Drawn(following, chosen, ids, values, count, jnp.ones_like(count))


@functools.partial(jax.jit, donate_argnames="rows")
def decode(
    models: Models,
    rows: Rows,
    pages: Array | np.ndarray,
    limit: Array | np.ndarray,
    replayed: Array | np.ndarray,
    allowed: Array,
    held: Array,
    steps: Array | int,
) -> tuple[Rows, Drawn]:
    """Decode up to `steps` tokens of every row, or with K guesses of a draft up to `steps` (1 + K).

    pages     int32 [R, M], pages of each row
    limit     int32 [R]: a row is idle once it has this many tokens in the cache
    replayed  int32 [R, N]: tokens to take in place of drawn ones; -1: draw
    allowed   uint32 [R, W], set of tokens of which the rows in `held` draw their first token; they draw no other
    held      bool [R]
    """
    pages, limit, replayed = jnp.asarray(pages), jnp.asarray(limit), jnp.asarray(replayed)
    model, draft, params = models.model, models.draft, with_rows(models.params, rows.adapter)
    R, vocab = rows.bias.shape
    T, row = 1 if draft is None else 1 + draft.tokens, jnp.arange(len(rows.length))

    def step(_: Array, carry: tuple[Rows, Drawn]) -> tuple[Rows, Drawn]:
        rows, drawn = carry
        tokens = rows.token[:, None]
        if draft is not None:
            entries, guesses = draft.propose(models.draft_params, rows, pages, limit)
            rows, tokens = dataclasses.replace(rows, draft=entries), jnp.concatenate([tokens, guesses], axis=1)
        real = (tokens >= 0) & (rows.length[:, None] + jnp.arange(T) < limit[:, None])
        real = jnp.cumprod(real.astype(jnp.int32), axis=1)  # padding is at the end
        rows, logits, ahead = _forward(models, params, rows, tokens, real, rows.length, pages)
        logits = reshard(logits, model.rules(None, None, None)).astype(jnp.float32)
        scale = rows.scale[:, None]
        totals = jax.nn.logsumexp(logits * scale[:, None], axis=-1, keepdims=True)

        def draw(j: Array | int, carry: tuple[Drawn, Seen, Array, Array]) -> tuple[Drawn, Seen, Array, Array]:
            """The token after input `j`, in the rows where that is the token drawn before it."""
            drawn, seen, alive, last = carry
            x = jax.lax.dynamic_index_in_dim(logits, j, axis=1, keepdims=False)[:, :vocab]
            total = jax.lax.dynamic_index_in_dim(totals, j, axis=1, keepdims=False)
            token = rows.draw(without(x, held, ~allowed), j, seen)
            forced = jnp.take_along_axis(replayed, drawn.count[:, None], 1, mode="clip")[:, 0]
            token = jnp.where(forced >= 0, forced, token)
            drawn = drawn.add(token, x * scale - total, rows.compares.any(), alive)
            seen = seen.add(jnp.where(alive, token, vocab))
            last = jnp.where(alive, token, last)
            if T > 1:
                after = jnp.minimum(j + 1, T - 1)
                guess, is_real = (jax.lax.dynamic_index_in_dim(x, after, 1, keepdims=False) for x in (tokens, real))
                alive &= (token == guess) & (is_real > 0) & (j + 1 < T) & ~held
            return drawn, seen, alive, last

        active = rows.length < limit
        before, start = drawn.count, (drawn, rows.seen, active, rows.token)
        drawn, seen, _, last = draw(0, start) if T == 1 else jax.lax.fori_loop(0, T, draw, start)
        drawn, new = dataclasses.replace(drawn, passes=drawn.passes + active), drawn.count - before
        history = rows.history
        if draft is not None:
            j = jnp.arange(T)
            written = jnp.take_along_axis(drawn.tokens, before[:, None] + j, 1, mode="clip")
            place = jnp.where(j < new[:, None], rows.length[:, None] + 1 + j, history.shape[1])
            history = history.at[row[:, None], place].set(written, mode="drop")
        rows = dataclasses.replace(rows, length=rows.length + new, token=last, seen=seen, history=history)
        if isinstance(draft, Heads) and ahead is not None:
            rows = draft.guess(model, rows, ahead, new)
        return rows, drawn

    return jax.lax.fori_loop(0, steps, step, (rows, Drawn.nothing(R, STEPS * T)))
