"""Decoder-only transformer: backbone and next-token logits. This is GPT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from gptjax.distributed.parameters import flat
from gptjax.distributed.sharding import ShardingRules
from gptjax.nn import cache as kv
from gptjax.nn.attention import MultiHeadAttention
from gptjax.nn.backbone import Backbone
from gptjax.nn.block import Context
from gptjax.nn.cache import Cache
from gptjax.nn.config import BackboneConfig, ModelConfig
from gptjax.types import Array, Params, UserError


@dataclasses.dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """Architecture of a decoder."""

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return Transformer(self, rules)

    def init_cache(
        self, batch: int, size: int, rules: ShardingRules = ShardingRules(), paged: bool = False
    ) -> tuple[Any, ...]:
        parts = [block.attention for block in self.stack(rules).blocks]
        other = next((type(part).__name__ for part in parts if not isinstance(part, MultiHeadAttention)), None)
        if self.cache_dtype is not None and other:
            raise UserError(f"model.cache_dtype: got {self.cache_dtype}, must be none with {other}")
        if self.cache_dtype is not None and not jax.sharding.get_abstract_mesh().empty:
            raise UserError(f"model.cache_dtype: got {self.cache_dtype}, must be none on a mesh")
        dtype = self.cache_dtype or self.dtype
        shape = batch, size, self.width, dtype, rules
        if paged:
            return tuple(part.init_pages(*shape, biased=self.positions.biased) for part in parts)
        return tuple(part.init_cache(*shape) for part in parts)


class Transformer(Backbone):
    """Tokens to next-token logits.

        model = Transformer(TransformerConfig(vocab=256, layers=4, width=128, heads=4))
        params = model.init(jax.random.key(0), tokens)["params"]
        logits, _ = model.apply({"params": params}, tokens)                 # [B, T] -> [B, T, V]

    The arguments are those of `Backbone`.
    """

    def head(self, x: Array, table: Array, context: Context) -> Array:
        return self.logits(x, self.unembedding(table))


def unstack(config: ModelConfig, params: Params) -> Params:
    """Parameters with one tree per layer, for decoding without copies. Unchanged if they are unstacked already."""
    return config.unstack(params)


def make_cache(
    config: ModelConfig, batch: int, size: int, rules: ShardingRules = ShardingRules(), *, paged: bool = False
) -> Cache:
    """Empty cache of `batch` rows of at most `size` tokens for this model, or of pages that rows share."""
    return kv.empty(config.init_cache(batch, size, rules, paged=paged), batch, size, rules("batch"))


def count(params: Params) -> int:
    """Number of elements in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flat(params).values())
