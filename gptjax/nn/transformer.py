"""The decoder-only transformer: embedding, a stack of blocks, final norm, head. This is the GPT."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.kernels.attention import Mask
from gptjax.kernels.embedding import embed
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.block import Context, dropout
from gptjax.nn.cache import Cache
from gptjax.nn.config import ModelConfig, TransformerConfig
from gptjax.nn.module import Layer, Weight
from gptjax.sharding import Rules
from gptjax.types import Array, Params


class Transformer(nn.Module):
    """Tokens to next-token logits.

        model = Transformer(TransformerConfig(vocab=256, layers=4, width=128, heads=4))
        params = model.init(jax.random.key(0), tokens)["params"]
        logits, _ = model.apply({"params": params}, tokens)                 # [B, T] -> [B, T, V]

    The blocks' parameters are stacked, see `stack.py`. With a cache the layers run one by one; `unstack` the parameters
    once before a loop of decoding steps. Dropout is on when the rng "dropout" is given.
    """

    config: TransformerConfig
    rules: Rules = Rules()

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        prefix: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """tokens int32 [B, T] -> logits [B, T, V] in the compute dtype, and the cache with T more slots filled.

        positions  int32 [B, T], places within the document; None: 0 .. T-1, after what the cache holds
        segments   int32 [B, T]; tokens attend within their own segment only; None: all one segment
        prefix     bool [B, T]: tokens that those before them see too, as in a prefix LM; all of it in one call
        """
        c, rules = self.config, self.rules
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        key = self.make_rng("dropout") if (c.dropout or c.layer_drop) and self.has_rng("dropout") else None
        weight, layer = Weight(self, rules, c.dtype), functools.partial(Layer, rules=rules, dtype=c.dtype)

        table = weight("embedding", (c.vocab, c.width), ("vocab", "embed"))
        x = embed(table, tokens, rules("vocab", None), rules("batch", "sequence", None))
        x = x * c.embedding_scale if c.embedding_scale != 1 else x
        x = layer(part=c.positions, name="positions")(x, positions)
        if c.embedding_norm is not None:
            x = layer(part=c.embedding_norm, name="embedding_norm")(x)
        x = dropout(x, c.dropout, None if key is None else jax.random.fold_in(key, 0))

        if cache is None:
            mask = Mask(query_segments=segments, key_segments=segments, prefix=prefix)
        else:
            segments = jnp.ones_like(tokens) if segments is None else segments
            filled = kv.write(cache.segments, segments, cache.length, axis=1)
            if prefix is not None:
                prefix = kv.write(jnp.zeros_like(filled, bool), prefix, cache.length, axis=1)
            cache = dataclasses.replace(cache, segments=filled)
            mask = Mask(offset=cache.length, query_segments=segments, key_segments=filled, prefix=prefix)
        distance = mask.distance(tokens.shape[1], tokens.shape[1] if cache is None else cache.size)
        bias = layer(part=c.positions.bias, name="relative")(distance, c.heads)
        blocks = c.stack(rules).clone(name="blocks", parent=self)
        context = Context(positions, mask, bias, start=x, tokens=tokens)
        slots = None if cache is None else cache.layers
        x, slots = blocks(x, context, slots, None if key is None else jax.random.fold_in(key, 1))
        if cache is not None and slots is not None:
            cache = Cache(slots, cache.segments, cache.length + tokens.shape[1])

        if c.residual.final_norm:
            x = layer(part=c.norm, name="norm")(x)
        head = table.T if c.tied else weight("head", (c.width, c.vocab), ("embed", "vocab"))
        logits = linear(x, head, rules("batch", "sequence", "vocab"))
        logits = logits * c.logit_scale if c.logit_scale != 1 else logits
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits, cache


def unstack(config: ModelConfig, params: Params) -> Params:
    """A model's parameters with its blocks as a tree a layer, which decoding reads without copying. Does nothing to
    what is unstacked already."""
    return config.unstack(params)


def make_cache(config: ModelConfig, batch: int, size: int, rules: Rules = Rules()) -> Cache:
    """An empty cache of `size` slots for this model."""
    return kv.empty(config.slots(batch, size, rules), batch, size, rules("batch", None))


def count(params: Params) -> int:
    """How many numbers there are in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
