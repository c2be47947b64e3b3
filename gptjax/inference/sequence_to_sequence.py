"""Generation with an encoder-decoder: sources are encoded once, then targets are decoded as in `generate`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed.sharding import on_mesh_of, reshard
from gptjax.inference.generate import DEFAULT_TOKENS, Completion, State, decode, prompt_seeds, round_up
from gptjax.inference.sampling import Sampling, SamplingRows, unseen
from gptjax.inference.text import TextStream
from gptjax.nn import EncoderDecoder, encoder_decoder, unstack
from gptjax.types import Array, Params, UserError


def generate_targets(
    model: Any,
    params: Params,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[int]],
    decoder_start_token_id: int,
    stop_token_ids: Sequence[int],
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = 32,
) -> list[Completion]:
    """Generate the target of each source (token ids), on the parameters' mesh.

    decoder_start_token_id  first token of every target; not part of the completion
    stop_token_ids          tokens that end a target (T5: 0, the padding, and 1)
    max_tokens              None: 256, or fewer if the model's positions end before
    seed                    source i has the seed `seed + i`
    batch                   number of sequences at a time; affects only speed and memory

    Raises UserError for an empty source, unknown tokens, and a source or `max_tokens` beyond the model's positions."""
    vocab, limits = model.config.vocab, (model.config.encoder.max_positions, model.config.max_positions)
    for source in sources:
        if not 0 < len(source) <= (limits[0] or len(source)):
            raise UserError(f"sources: got one of {len(source)} tokens, must have 1 to {limits[0] or 'any number'}")
        if not 0 <= min(source) <= max(source) < vocab:
            raise UserError(f"sources: got tokens {min(source)} to {max(source)}, must be 0 to {vocab - 1}")
    longest = min(DEFAULT_TOKENS, limits[1] or DEFAULT_TOKENS) if max_tokens is None else max_tokens
    if not 1 <= longest <= (limits[1] or longest):
        raise UserError(f"max_tokens: got {longest}, must be 1 to {limits[1] or 'any number'}, the model's positions")
    vocab = min(tokenizer.vocab, vocab)
    seeds = prompt_seeds(seed, len(sources))
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))  # minimises padding
    completions: dict[int, Completion] = {}
    with on_mesh_of(params):
        params = unstack(model.config, params)
        for first in range(0, len(order), batch):
            group = order[first : first + batch]
            width = min(round_up(max(len(sources[i]) for i in group)), limits[0] or sys.maxsize)
            tokens, segments = np.zeros((2, len(group), width), np.int32)
            for row, i in enumerate(group):
                tokens[row, : len(sources[i])], segments[row, : len(sources[i])] = sources[i], 1
            start = np.int32(decoder_start_token_id)
            state = begin(model, params, tokens, segments, start, seeds[group], round_up(longest), vocab)
            done, settings = np.zeros(len(group), bool), SamplingRows.of([sampling] * len(group))
            state = decode(model, params, state, longest, done, np.asarray(stop_token_ids, np.int32), settings)
            drawn, logprobs, count = jax.device_get((state.tokens, state.logprobs, state.count))
            for row, i in enumerate(group):
                new = row, slice(int(count))
                completions[i] = _completion(
                    tokenizer, longest, stop_token_ids, drawn[new].tolist(), logprobs[new].tolist()
                )
    return [completions[i] for i in range(len(sources))]


def _completion(
    tokenizer: Tokenizer, longest: int, stop_token_ids: Sequence[int], ids: Sequence[int], logprobs: Sequence[float]
) -> Completion:
    row = TextStream(tokenizer, longest, (), stop_token_ids)
    row.extend(ids, logprobs)
    assert row.finish is not None
    return Completion(tokenizer.decode(row.ids), tuple(row.ids), tuple(row.logprobs), row.finish)


@functools.partial(jax.jit, static_argnames=("model", "size", "vocab"))
def begin(
    model: EncoderDecoder,
    params: Params,
    source: Array,
    segments: Array,
    start: Array,
    seeds: Array,
    size: int,
    vocab: int,
) -> State:
    """State of B targets before their first token: their sources, int32 [B, S], are encoded.

    segments  int32 [B, S]. 0: padding
    start     int32 scalar, first token of every target
    seeds     uint32 [B]
    size      maximum number of tokens of a target
    vocab     vocabulary size of the tokenizer
    """
    B = source.shape[0]
    rules = model.rules.for_batch_size(B)
    source, segments = (reshard(x, rules("batch", None)) for x in (source, segments))
    return State(
        token=jnp.full(B, start),
        tokens=jnp.zeros((B, size), jnp.int32),
        logprobs=jnp.zeros((B, size), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        keys=jax.vmap(jax.random.key)(seeds),
        seen=unseen(B, vocab),
        cache=encoder_decoder.encode(model.clone(rules=rules), params, source, size, segments=segments),
    )
