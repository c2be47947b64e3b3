"""Decoder with extra heads for later tokens (Gloeckle et al. 2024, arXiv:2404.19737). Each head is a block on the
backbone's hidden states, with the embeddings of the first head. They are used in training, by the objective
`MultiToken`. Otherwise they are not computed, and the model equals its `Transformer`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.nn.backbone import Backbone
from gptjax.nn.block import Context
from gptjax.nn.module import ParamFactory
from gptjax.nn.transformer import TransformerConfig
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class MultiTokenConfig(TransformerConfig):
    """Architecture of a decoder with extra heads for later tokens."""

    ahead: int = 1
    """Number of extra heads, for the tokens after the next one. 3 in the paper."""

    def __post_init__(self):
        super().__post_init__()
        if self.ahead < 1:
            raise UserError(f"model.ahead: got {self.ahead}, must be at least 1; or use TransformerConfig")
        if self.block(self.pattern[0]).attention.uses_first_values:
            raise UserError(
                "model.attention.values: got ValueResidual, must be another, or none, with extra heads: they "
                "are no layers of the stack"
            )

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return MultiTokenTransformer(self, rules)

    def flops(self, length: int) -> int:
        """FLOPs with the extra heads, as in training."""
        block = dataclasses.replace(self, layers=1, leading_layers=(), pattern=self.pattern[:1])
        return super().flops(length) + self.ahead * TransformerConfig.flops(block, length)


class MultiTokenTransformer(Backbone):
    """`Transformer` with extra heads. In the collection "ahead", if it is mutable, logits [B, T, V] named "0", "1", ...
    of the token after the next one, the one after that, ...

    (logits, cache), sown = model.apply({"params": params}, tokens, mutable=["ahead"])
    """

    config: MultiTokenConfig

    def head(self, x: Array, table: Array, context: Context) -> Array:
        c, unembedding = self.config, self.unembedding(table)
        decodes = context.mask.offset is not None
        if self.is_initializing() or (self.is_mutable_collection("ahead") and not decodes):
            param = ParamFactory.for_module(self, self.rules, c.dtype)
            for i in range(c.ahead):
                block = c.block(c.pattern[0], self.rules).clone(name=f"ahead_{i}", parent=self)
                y, _ = block(x, context)
                y = c.norm(param.child(f"ahead_norm_{i}"), y)
                if not self.is_initializing():
                    nothing = functools.partial(jnp.zeros, ())
                    logits = self.logits(y, unembedding, name=str(i))
                    self.sow("ahead", str(i), logits, reduce_fn=jnp.add, init_fn=nothing)
        return self.logits(x, unembedding)
