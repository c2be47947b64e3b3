"""The decoder-only transformer: embedding, a stack of blocks, final norm, head. This is the GPT."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask
from gptjax.kernels.embedding import embed
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.block import Context, dropout
from gptjax.nn.cache import Cache
from gptjax.nn.config import ModelConfig, TransformerConfig
from gptjax.nn.module import Layer, ParamFactory
from gptjax.types import Array, Params


class Trunk(nn.Module):
    """What models over tokens have in common: embedding, blocks, final norm, and a head that makes logits. A model is a
    subclass with a `__call__`, in which these run; so the parameters of all have the same names.
    """

    config: TransformerConfig
    rules: ShardingRules = ShardingRules()

    @property
    def trunk(self) -> TransformerConfig:
        """The configuration of what all have in common."""
        return self.config

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        prefix: Array | None = None,
        *,
        token_types: Array | None = None,
        table: Array | None = None,
        source: Array | None = None,
        source_segments: Array | None = None,
    ) -> tuple[Array, Array, Cache | None, Context]:
        """Hidden states [B, T, D] after the final norm, the table of embeddings [V, D], the cache with T more slots
        filled, and what the blocks saw beside their input. The arguments are those of `Transformer`."""
        c, rules = self.trunk, self.rules
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        key = self.make_rng("dropout") if (c.dropout or c.layer_drop) and self.has_rng("dropout") else None
        param, layer = ParamFactory(self, rules, c.dtype), functools.partial(Layer, rules=rules, dtype=c.dtype)

        if table is None:
            table = param("embedding", (c.vocab, c.width), ("vocab", "embed"), kind="embedding")
        x = embed(table, tokens, rules("vocab", None), rules("batch", "sequence", None))
        x = x * c.embedding_scale if c.embedding_scale != 1 else x
        if c.token_types:
            kinds = param("type_embedding", (c.token_types, c.width), (None, "embed"), kind="embedding")
            token_types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + embed(kinds, token_types, rules(None, None), rules("batch", "sequence", None))
        x = layer(part=c.positions, name="positions")(x, positions)
        if c.embedding_norm is not None:
            x = layer(part=c.embedding_norm, name="embedding_norm")(x)
        x = dropout(x, c.dropout, None if key is None else jax.random.fold_in(key, 0))

        if cache is None:
            mask = Mask(causal=c.causal, query_segments=segments, key_segments=segments, prefix=prefix)
        else:
            segments = jnp.ones_like(tokens) if segments is None else segments
            filled = kv.write(cache.segments, segments, cache.length, axis=1)
            if prefix is not None:
                prefix = kv.write(jnp.zeros_like(filled, bool), prefix, cache.length, axis=1)
            cache = dataclasses.replace(cache, segments=filled)
            source_segments = cache.source_segments
            mask = Mask(offset=cache.length, query_segments=segments, key_segments=filled, prefix=prefix)
        distance = mask.distance(tokens.shape[1], tokens.shape[1] if cache is None else cache.size)
        bias = layer(part=c.positions.bias, name="relative")(distance, c.heads, c.causal)
        if source_segments is not None and segments is None:
            segments = jnp.ones_like(tokens)
        seen = Mask(causal=False, query_segments=segments, key_segments=source_segments)
        context = Context(positions, mask, bias, start=x, tokens=tokens, source=source, source_mask=seen)
        blocks = c.stack(rules).clone(name="blocks", parent=self)
        slots = None if cache is None else cache.layers
        x, slots = blocks(x, context, slots, None if key is None else jax.random.fold_in(key, 1))
        if cache is not None and slots is not None:
            cache = dataclasses.replace(cache, layers=slots, length=cache.length + tokens.shape[1])

        x = layer(part=c.norm, name="norm")(x) if c.residual.final_norm else x
        return x, table, cache, context

    def head(self, table: Array) -> Array:
        """[D, V], what hidden states are multiplied with: the embeddings [V, D] or a matrix of its own."""
        c = self.trunk
        if c.tie_embeddings:
            return table.T
        param = ParamFactory(self, self.rules, c.dtype)
        return param("head", (c.width, c.vocab), ("embed", "vocab"), kind="head")

    def logits(self, x: Array, head: Array) -> Array:
        """Hidden states [B, T, D] and the head [D, V] -> logits [B, T, V] in the compute dtype."""
        c = self.trunk
        logits = linear(x, head, self.rules("batch", "sequence", "vocab"))
        scale = c.logit_scale / c.width_multiplier
        logits = logits * scale if scale != 1 else logits
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits


class Features(Trunk):
    """Tokens to hidden states [B, T, D], and the cache: `Transformer` without its head, over the same parameters."""

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Cache | None]:
        x, _, cache, _ = self.hidden(*args, **kwargs)
        return x, cache


class Transformer(Trunk):
    """Tokens to next-token logits.

        model = Transformer(TransformerConfig(vocab=256, layers=4, width=128, heads=4))
        params = model.init(jax.random.key(0), tokens)["params"]
        logits, _ = model.apply({"params": params}, tokens)                 # [B, T] -> [B, T, V]

    The blocks' parameters are stacked, see `stack.py`. With a cache the layers run one by one; `unstack` the parameters
    once before a loop of decoding steps. Dropout is on when the rng "dropout" is given.
    """

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        prefix: Array | None = None,
        *,
        token_types: Array | None = None,
        table: Array | None = None,
        source: Array | None = None,
        source_segments: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """tokens int32 [B, T] -> logits [B, T, V] in the compute dtype, and the cache with T more slots filled.

        positions  int32 [B, T], places within the document; None: 0 .. T-1, after what the cache holds
        segments   int32 [B, T]; tokens attend within their own segment only; None: all one segment
        prefix     bool [B, T]: tokens that those before them see too, as in a prefix LM; all of it in one call
        token_types  int32 [B, T], the kinds of the tokens where the config has `token_types`; None: all 0
        table      [V, D], embeddings that are shared with another model; None: this one's own

        For a model with cross-attention, and with a cache neither, for that holds what they say:

        source           [B, S, D], what it reads
        source_segments  int32 [B, S]; tokens see what is of their own segment in the source; None: all of it
        """
        given = {"token_types": token_types, "table": table, "source": source, "source_segments": source_segments}
        x, table, cache, _ = self.hidden(tokens, positions, segments, cache, prefix, **given)
        return self.logits(x, self.head(table)), cache


def unstack(config: ModelConfig, params: Params) -> Params:
    """A model's parameters with its blocks as a tree a layer, which decoding reads without copying. Does nothing to
    what is unstacked already."""
    return config.unstack(params)


def make_cache(config: ModelConfig, batch: int, size: int, rules: ShardingRules = ShardingRules()) -> Cache:
    """An empty cache of `size` slots for this model."""
    return kv.empty(config.slots(batch, size, rules), batch, size, rules("batch", None))


def count(params: Params) -> int:
    """How many numbers there are in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
