"""Text from an encoder-decoder: sources are read once, then targets are written as `generate` writes texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.inference.generate import State, decode
from gptjax.inference.sampling import Sampling
from gptjax.nn import EncoderDecoder, encoder_decoder
from gptjax.types import Array, Params, UserError


def respond(
    model: EncoderDecoder,
    params: Params,
    sources: Sequence[Sequence[int]],
    start: int,
    ends: Sequence[int],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[list[int]]:
    """The target of each source, token ids, without the `start` that it begins with, down to the first of `ends` (kept)
    or `max_tokens`. In T5 `start` is the padding's id, 0, and 1 ends a text. Source i is answered with the seed
    `seed + i`. Raises UserError for an empty source, and where `max_tokens` is more than the model's positions."""
    if not all(map(len, sources)):
        raise UserError("sources: got one of no tokens, must have at least one")
    limit = model.config.limit
    if max_tokens < 1 or (limit is not None and max_tokens > limit):
        raise UserError(f"max_tokens: got {max_tokens}, must be at least 1 and at most the model's positions, {limit}")
    tokens = np.zeros((len(sources), max(map(len, sources))), np.int32)
    segments = np.zeros_like(tokens)
    for row, source in enumerate(sources):
        tokens[row, : len(source)], segments[row, : len(source)] = source, 1
    params = model.config.unstack(params)
    seeds = np.arange(seed, seed + len(sources)).astype(np.uint32)
    vocab = model.config.vocab
    seen = vocab if sampling.penalizes else 0
    state = _begin(model, params, tokens, segments, np.int32(start), seeds, max_tokens, seen)
    done = np.zeros(len(sources), bool)
    state = decode(model, params, state, max_tokens, done, np.asarray(ends, np.int32), sampling, vocab)
    written = np.asarray(state.tokens)[:, 1 : int(state.cache.length) + 1].tolist()
    return [_until(row, ends) for row in written]


@functools.partial(jax.jit, static_argnames=("model", "size", "seen"))
def _begin(
    model: EncoderDecoder,
    params: Params,
    source: Array,
    segments: Array,
    start: Array,
    seeds: Array,
    size: int,
    seen: int,
) -> State:
    B = source.shape[0]
    return State(
        tokens=jnp.zeros((B, size + 1), jnp.int32).at[:, 0].set(start),
        logprobs=jnp.zeros((B, size + 1), jnp.float32),
        positions=jnp.zeros(B, jnp.int32),
        keys=jax.vmap(jax.random.key)(seeds),
        seen=jnp.zeros((B, seen), bool) if seen else None,
        cache=encoder_decoder.read(model, params, source, size, segments=segments),
    )


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids down to the first that is one of `ends`."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]
