"""Text generation: a prefill pass over the prompts fills a cache, then one jitted loop decodes a token at a time.

    completions = generate(model, params, tokenizer, [tokenizer.encode("Once upon")], max_tokens=100, seed=1)
    for piece in stream(model, params, tokenizer, prompt): print(piece, end="")

A sequence depends on its own prompt and seed, not on the other sequences of the batch or on the size of chunks.

Generation runs on the parameters' mesh, with a model that has their sharding rules. Sampling is replicated on all
devices: everything except the model and its cache is small.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed.sharding import on_mesh_of, reshard
from gptjax.inference.sampling import Sampling, SamplingRows, Seen, sample, unseen
from gptjax.inference.text import Finish, TextStream
from gptjax.nn import Cache, make_cache, unstack
from gptjax.protocols import Module
from gptjax.types import Array, Key, Params, UserError

DEFAULT_TOKENS = 256
"""Default maximum number of tokens."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A model's continuation of a prompt."""

    text: str
    """The text without special tokens and without the stop string."""
    ids: tuple[int, ...]
    """The sampled tokens, including the token or the stop string that ended the text."""
    logprobs: tuple[float, ...]
    """Log-probability of each of `ids` in nats, under the model itself: before temperature, filters and penalty."""
    finish: Finish
    """Reason for the end: "stop" or "length"."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """B sequences during generation."""

    token: Array
    """int32 [B], next input token of each sequence."""
    tokens: Array
    """int32 [B, N]: sampled tokens. Those from `count` on are not sampled yet."""
    logprobs: Array
    """float32 [B, N]: their log-probabilities."""
    count: Array
    """int32 scalar."""
    keys: Key
    """[B]: one random key per sequence."""
    seen: Seen
    """Tokens of the prompts and of the texts after them."""
    cache: Cache
    """Cache of the tokens before `token`."""


@functools.partial(jax.jit, static_argnames=("model", "samples", "size", "room", "vocab"))
def prefill(
    model: Module,
    params: Params,
    tokens: Array,
    lengths: Array,
    seeds: Array,
    samples: int,
    size: int,
    room: int,
    vocab: int,
) -> State:
    """Read all but the last token of P prompts into a cache of `size`, and repeat each for its samples.

    tokens   int32 [P, T], prompts with padding after them
    lengths  int32 [P], lengths of the prompts
    seeds    uint32 [P]
    room     N, maximum number of tokens to sample
    vocab    vocabulary size of the tokenizer

    Returns the state of P * samples sequences.
    """
    P, T = tokens.shape
    rules, rows = model.rules.for_batch_size(P), model.rules.for_batch_size(P * samples)
    prompts, keys = jnp.arange(P), jax.vmap(jax.random.key)(seeds)
    real = jnp.arange(T) < lengths[:, None]
    seen = unseen(P, vocab)
    written = jnp.where(real, tokens, vocab)
    seen = dataclasses.replace(seen, prompt=seen.prompt.at[prompts[:, None], written].set(True, mode="drop"))
    real = (jnp.arange(T) < lengths[:, None] - 1).astype(jnp.int32)
    inputs = [reshard(x[:, :-1], rules("batch", None)) for x in (tokens, real)]
    # These logits are unused, so the compiler drops the head, the largest matrix product.
    cache = make_cache(model.config, P, size, rules)
    _, cache = model.clone(rules=rules).apply({"params": params}, inputs[0], None, inputs[1], cache)
    # There may be too few prompts to shard over the mesh, but enough samples.
    target = make_cache(model.config, P * samples, size, rows)

    def repeat(x: Array, target: Array | None = None) -> Array:
        no_mesh = jax.sharding.get_abstract_mesh().empty
        spec = None if no_mesh else PartitionSpec() if target is None else jax.typeof(target).sharding.spec
        return jnp.repeat(x, samples, axis=0, out_sharding=spec)

    return State(
        token=repeat(tokens[prompts, lengths - 1]),
        tokens=jnp.zeros((P * samples, room), jnp.int32),
        logprobs=jnp.zeros((P * samples, room), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        keys=jax.vmap(jax.random.fold_in)(repeat(keys), jnp.arange(P * samples) % samples),
        seen=jax.tree.map(repeat, seen),
        cache=jax.tree.map(repeat, cast(Cache, cache), target),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: Module,
    params: Params,
    state: State,
    until: Array | int,
    done: Array | np.ndarray,
    stop_token_ids: Array | np.ndarray,
    sampling: SamplingRows,
) -> State:
    """Decode until there are `until` sampled tokens or all sequences are done: those in `done` bool [B], and those that
    sampled one of `stop_token_ids` int32 [n]. Tokens beyond the tokenizer's vocabulary are never sampled."""
    B, vocab = state.seen.counts.shape
    rules = model.rules.for_batch_size(B)
    reader = model.clone(rules=rules)

    # XLA's CPU backend copies arrays with an axis of size 1 at every token: the loop carries a single row's cache
    # without the axis of rows.
    one_row = B == 1 and jax.sharding.get_abstract_mesh().empty
    squeeze = functools.partial(_map_cache, lambda x: x[0] if one_row else x)
    expand = functools.partial(_map_cache, lambda x: x[None] if one_row else x)

    def going(carry: tuple[State, Array]) -> Array:
        state, done = carry
        return (state.count < until) & ~done.all()

    def step(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, done = expand(carry[0]), carry[1]
        token = reshard(state.token[:, None], rules("batch", None))
        logits, cache = reader.apply({"params": params}, token, cache=state.cache)
        logits = reshard(logits[:, 0], rules(None, None)).astype(jnp.float32)
        total, logits = jax.nn.logsumexp(logits, axis=-1), logits[:, :vocab]
        # The key of a draw depends on the sequence and the position alone.
        positions = reshard(state.cache.length, rules(None))
        drawn = sample(logits, jax.vmap(jax.random.fold_in)(state.keys, positions), sampling, state.seen)
        logprob = jnp.take_along_axis(logits, drawn[:, None], 1)[:, 0] - total
        state = dataclasses.replace(
            state,
            token=drawn,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, drawn[:, None], state.count, axis=1),
            logprobs=jax.lax.dynamic_update_slice_in_dim(state.logprobs, logprob[:, None], state.count, axis=1),
            count=state.count + 1,
            seen=state.seen.add(drawn),
            cache=cast(Cache, cache),
        )
        return squeeze(state), done | (drawn[:, None] == stop_token_ids).any(-1)

    return expand(jax.lax.while_loop(going, step, (squeeze(state), jnp.asarray(done)))[0])


def _map_cache(function: Callable[[Array], Array], state: State) -> State:
    """`function` applied to every array of the cache entries."""
    layers = jax.tree.map(function, state.cache.layers)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))


def generate(
    model: Module,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch: int = 32,
    stop_token_ids: Sequence[int] | None = None,
    marks: Mapping[int, str] | None = None,
) -> list[Completion]:
    """Generate `samples` completions of each prompt (token ids); completions of one prompt are adjacent.

    max_tokens      None: 256, or fewer if the model's positions end before
    seed            prompt i has the seed `seed + i`
    stop            strings that end a text and are not part of it
    batch           number of sequences at a time; affects only speed and memory
    stop_token_ids  tokens that end a text. None: all special tokens
    marks           special tokens that are part of a text, and their texts

    Raises UserError for a prompt that is empty, has unknown tokens, or does not fit the model's positions.
    """
    if samples < 1:
        raise UserError(f"samples: got {samples}, must be at least 1")
    rooms = [_room(model, prompt, max_tokens) for prompt in prompts]
    seeds = prompt_seeds(seed, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # minimises padding
    rows: list[list[TextStream]] = [[] for _ in prompts]
    step = max(batch // samples, 1)
    for start in range(0, len(order), step):
        group = order[start : start + step]
        for i in group:
            rows[i] = _rows(tokenizer, rooms[i], stop, samples, stop_token_ids, marks)
        steps = (lambda: 16) if stop else (lambda: 1 << 30)  # stop strings are checked on the host
        run = _run(
            model,
            params,
            tokenizer,
            [prompts[i] for i in group],
            seeds[group],
            [row for i in group for row in rows[i]],
            sampling,
            steps,
        )
        for _ in run:
            pass
    return [_completion(row) for group in rows for row in group]


def stream(
    model: Module,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
) -> Generator[str, None, Completion]:
    """Stream the text that `generate` returns for this prompt, in pieces; returns the Completion.

    A piece never splits a character, and a possible beginning of a stop string is withheld until it is decided. For one
    process only: the size of pieces depends on the clock, so several processes would diverge.
    """
    rows = _rows(tokenizer, _room(model, prompt, max_tokens), stop, 1, stop_token_ids)
    shown = 0
    for _ in _run(model, params, tokenizer, [prompt], prompt_seeds(seed, 1), rows, sampling, _Pace()):
        safe = rows[0].safe
        if len(safe) > shown:
            yield safe[shown:]
            shown = len(safe)
    return _completion(rows[0])


def prompt_seeds(seed: int, count: int) -> np.ndarray:
    """Seeds of `count` prompts, `seed + i`: uint32 [count]. Raises UserError for those that are beyond 32 bits."""
    if not 0 <= seed <= 2**32 - max(count, 1):
        raise UserError(f"seed: got {seed}, must be 0 to {2**32 - max(count, 1)}")
    return (np.arange(count) + seed).astype(np.uint32)


def _run(
    model: Module,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seeds: np.ndarray,
    rows: Sequence[TextStream],
    sampling: Sampling,
    steps: Callable[[], int],
) -> Iterator[None]:
    """Generate the sequences, equally many per prompt, until all are finished; yields every `steps()` tokens."""
    longest = max(row.max_tokens for row in rows)
    T = round_up(max(map(len, prompts)))
    room = round_up(longest)
    tokens = np.zeros((len(prompts), T), np.int32)
    for line, prompt in zip(tokens, prompts, strict=True):
        line[: len(prompt)] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    vocab = min(tokenizer.vocab, model.config.vocab)
    stop_token_ids = np.asarray(sorted(rows[0].stop_token_ids), np.int32)
    settings, samples = SamplingRows.of([sampling] * len(rows)), len(rows) // len(prompts)
    with on_mesh_of(params):
        # Unstacked layers: slices of stacked parameters would be copied at every token.
        params = unstack(model.config, params)
        state = prefill(model, params, tokens, lengths, seeds, samples, round_up(T + longest), room, vocab)
    written = 0
    while not all(row.finish for row in rows):
        done = np.asarray([row.finish is not None for row in rows])
        until = min(written + steps(), longest)
        with on_mesh_of(params):  # not around the yield, so that the caller's code does not run on this mesh
            state = decode(model, params, state, until, done, stop_token_ids, settings)
        drawn, logprobs, count = jax.device_get((state.tokens, state.logprobs, state.count))
        new = slice(written, int(count))
        for row, ids, values in zip(rows, drawn[:, new].tolist(), logprobs[:, new].tolist(), strict=True):
            row.extend(ids, values)
        written = new.stop
        yield


class _Pace:
    """Number of tokens between updates: as many as take about 30 ms, so that text flows and the device seldom waits for
    the host."""

    def __init__(self):
        self.steps, self.last = 1, time.perf_counter()

    def __call__(self) -> int:
        now = time.perf_counter()
        self.steps = min(self.steps * 2, 16) if now - self.last < 0.03 else max(self.steps // 2, 1)
        self.last = now
        return self.steps


def round_up(n: int) -> int:
    """Round up to 32, 48, 64, 96, 128, 192, 256, ...: few sizes to compile, each at most half too large."""
    step = 2 ** max((n - 1).bit_length() - 2, 4)
    return max(math.ceil(n / step) * step, 32)


def _rows(
    tokenizer: Tokenizer,
    max_tokens: int,
    stop: Sequence[str],
    samples: int,
    stop_token_ids: Sequence[int] | None,
    marks: Mapping[int, str] | None = None,
) -> list[TextStream]:
    if isinstance(stop, str) or not all(stop):
        raise UserError(f"stop: got {stop!r}, must be a sequence of strings, none of them empty")
    return [TextStream(tokenizer, max_tokens, stop, stop_token_ids, marks) for _ in range(samples)]


def _room(model: Module, prompt: Sequence[int], max_tokens: int | None) -> int:
    """Maximum number of tokens after this prompt. Raises UserError if it does not fit the model."""
    vocab, limit = model.config.vocab, model.config.max_positions
    if not len(prompt):
        raise UserError("prompt: got no tokens, must have at least one")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise UserError(f"prompt: got tokens {min(prompt)} to {max(prompt)}, must be 0 to {vocab - 1} for this model")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens: got {max_tokens}, must be at least 1")
    if limit is not None and len(prompt) + (max_tokens or 1) > limit:
        raise UserError(
            f"max_tokens: got {max_tokens or 1} after a prompt of {len(prompt)} tokens, must be at most "
            f"{max(limit - len(prompt), 0)}: the model has {limit} positions; shorten the prompt or the answer"
        )
    return max_tokens or min(DEFAULT_TOKENS, DEFAULT_TOKENS if limit is None else limit - len(prompt))


def _completion(row: TextStream) -> Completion:
    assert row.finish is not None
    return Completion(row.text, tuple(row.ids), tuple(row.logprobs), row.finish)
