"""The backbone of every model over tokens: embedding, blocks, final norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules, reshard
from gptjax.kernels.attention import Mask
from gptjax.kernels.cross_entropy import DeferredLogits
from gptjax.kernels.embedding import embed
from gptjax.kernels.linear import PackedWeight
from gptjax.nn import cache as kv
from gptjax.nn.block import Context, dropout
from gptjax.nn.cache import Cache
from gptjax.nn.config import BackboneConfig
from gptjax.nn.decode import decode
from gptjax.nn.module import ParamFactory
from gptjax.nn.scan import scan
from gptjax.types import Array, UserError


class Backbone(nn.Module):
    """Tokens to hidden states. A model is a subclass with a `head`. All models name their common parameters alike.

        model = Backbone(TransformerConfig(vocab=256, layers=4, width=128, heads=4))
        params = model.init(jax.random.key(0), tokens)["params"]
        x, _ = model.apply({"params": params}, tokens)                      # [B, T] -> [B, T, D]

    The parameters of the blocks are stacked, see `stack.py`. With a cache the layers run one by one: `unstack` the
    parameters once before decoding. The rng "dropout" enables dropout.
    """

    config: Any
    """A `BackboneConfig`, or a configuration with one; see `backbone`."""
    rules: ShardingRules = ShardingRules()
    """Mesh axes of the logical axes."""

    @property
    def backbone(self) -> BackboneConfig:
        """Configuration of embedding, blocks and final norm."""
        return self.config

    def head(self, x: Array, table: Array, context: Context) -> Array:
        """Output of the model from hidden states x [B, T, D] after the final norm, and embeddings [V, D]."""
        return x

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
        encoder_output: Array | None = None,
        source_segments: Array | None = None,
        **options: Any,
    ) -> tuple[Array, Cache | None]:
        """tokens int32 [B, T] -> output of `head`, in the compute dtype, and the cache with the new tokens.

        positions    int32 [B, T], positions within the document. None: 0 .. T-1, plus the row's length in the cache
        segments     int32 [B, T]; tokens attend within their segment; padding is segment 0. None: one segment. With a
                     cache a row is one text, and only padding, at the end, has another segment
        cache        see `make_cache`. None: whole sequences
        prefix       bool [B, T]: tokens that earlier ones attend to as well, as in a prefix LM; all of it in one call
        token_types  int32 [B, T], if the config has `token_types`; more than it has are the last. None: all 0
        table        [V, D], embeddings shared with another model. None: this model's own
        options      passed to `head`

        For cross-attention (with a cache None: it has both):

        encoder_output   [B, S, D]
        source_segments  int32 [B, S]; tokens attend to their own segment of the source. None: to all of it
        """
        c, rules = self.backbone, self.rules
        param = ParamFactory.for_module(self, rules, c.dtype)
        key = self.make_rng("dropout") if c.is_random and self.has_rng("dropout") else None
        if positions is None:
            start = 0 if cache is None else cache.length[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)

        if table is None:
            table = param("embedding", (c.vocab, c.width), ("vocab", "embed"), kind="embedding")
        x = self._embed(param, table, tokens, positions, token_types)
        x = dropout(x, c.dropout, None if key is None else jax.random.fold_in(key, 0))

        if cache is not None:
            segments = jnp.ones_like(tokens) if segments is None else segments
            source_segments = cache.source_segments
        mask = self._mask(tokens, segments, cache, prefix)
        if source_segments is not None and segments is None:
            segments = jnp.ones_like(tokens)
        encoder_mask = Mask(causal=False, query_segments=segments, key_segments=source_segments)
        distance = mask.distance(tokens.shape[1], tokens.shape[1] if cache is None else cache.size)
        bias = self._bias(param.child("relative"), distance)
        context = Context(
            positions, mask, bias, x0=x, tokens=tokens, encoder_output=encoder_output, encoder_mask=encoder_mask
        )

        stack, blocks = c.stack(rules), param.child("blocks")
        if self.is_initializing():
            blocks.declare(stack.init(blocks.tree.make_rng("params"), x, context))
        params = blocks.params
        if self.is_initializing() and (rules.mesh_axes("layers") or not stack.uses_first_values):
            pass  # x has the right shape
        elif cache is None and "layer_0" not in params:
            key = None if key is None else jax.random.fold_in(key, 1)
            x, losses, updates = scan(stack, params, x, context, key)
            for name, loss in losses.items():
                blocks.add_loss(name, loss)
            for name, update in updates.items():
                blocks.update(name, update)
        elif key is None:
            x, cache = decode(stack, blocks, params, x, context, cache)
        else:
            raise UserError(
                'rngs: got a key "dropout", must be none with a cache or after `unstack`, which are for decoding; '
                "train the stacked parameters"
            )
        if c.residual.final_norm:
            x = c.norm(param.child("norm"), x)
            param.capture("norm_output", x)
        return self.head(x, table, context, **options), cache

    def _embed(
        self, param: ParamFactory, table: Array, tokens: Array, positions: Array, token_types: Array | None
    ) -> Array:
        """Input of the first block [B, T, D]: embeddings of tokens, of their types and positions, normalised."""
        c, rules = self.backbone, self.rules
        x = embed(table, tokens, rules("vocab", None), rules("batch", "sequence", None))
        x = x * c.embedding_scale if c.embedding_scale != 1 else x
        if c.token_types:
            kinds = param("type_embedding", (c.token_types, c.width), (None, "embed"), kind="embedding")
            token_types = jnp.zeros_like(tokens) if token_types is None else jnp.minimum(token_types, c.token_types - 1)
            x = x + embed(kinds, token_types, rules(None, None), rules("batch", "sequence", None))
        x = c.positions(param.child("positions"), x, positions)
        param.capture("positions_output", x)
        if c.embedding_norm is not None:
            x = c.embedding_norm(param.child("embedding_norm"), x)
            param.capture("embedding_norm_output", x)
        return x

    def _mask(self, tokens: Array, segments: Array | None, cache: Cache | None, prefix: Array | None) -> Mask:
        """Tokens that each token attends to, of this call or of the cache."""
        if cache is None:
            return Mask(causal=self.backbone.causal, query_segments=segments, key_segments=segments, prefix=prefix)
        mask = Mask(offset=cache.length, query_segments=segments)
        if prefix is not None:
            spec = self.rules("batch", None, None)
            seen = jnp.zeros((len(tokens), cache.size, 1), bool, out_sharding=spec)
            mask = dataclasses.replace(mask, prefix=kv.write(seen, prefix[:, :, None], mask)[:, :, 0])
        return dataclasses.replace(mask, pages=cache.pages)

    def _bias(self, param: ParamFactory, distance: Array) -> Array | None:
        """Addition to the scores, [N, T, S] for distances [T, S], or [B, N, T, S] for [B, T, S]. None: nothing."""
        c, rules = self.backbone, self.rules
        if distance.ndim == 2:
            return c.positions.bias(param, distance, c.heads, c.causal)
        B, T, S = distance.shape
        distance = reshard(distance, rules(None, None, None)).reshape(B * T, S)
        if (bias := c.positions.bias(param, distance, c.heads, c.causal)) is None:
            return None
        return reshard(bias.reshape(-1, B, T, S).swapaxes(0, 1), rules("batch", "heads", None, None))

    def unembedding(self, table: Array) -> Array:
        """Matrix from hidden states to logits [D, V]: the transposed embeddings or a parameter."""
        c = self.backbone
        if c.tie_embeddings:
            return table.T
        param = ParamFactory.for_module(self, self.rules, c.dtype)
        return param("head", (c.width, c.vocab), ("embed", "vocab"), kind="head")

    def logits(self, x: Array, unembedding: Array, bias: Array | None = None, name: str = "next") -> Array:
        """Hidden states [B, T, D], `unembedding` [D, V] and bias [V] -> logits [B, T, V] in the compute dtype.

        In the collection "deferred_logits", if it is mutable, `DeferredLogits` of this name: a loss that uses them
        instead never has all logits, because the compiler drops unused ones."""
        deferred = self.deferred_logits(x, unembedding, bias)
        wanted = self.is_mutable_collection("deferred_logits") and not self.is_initializing()
        if wanted and not isinstance(unembedding, PackedWeight):
            self.sow("deferred_logits", name, deferred, lambda _, new: new, lambda: deferred)
        return deferred.logits(self.rules("batch", "sequence", "vocab"))

    def deferred_logits(self, x: Array, unembedding: Array, bias: Array | None = None) -> DeferredLogits:
        """`logits`, not yet computed."""
        c = self.backbone
        return DeferredLogits(x, unembedding, bias, c.logit_scale / c.width_multiplier, c.logit_softcap)
