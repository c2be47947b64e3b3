"""Decoder with extra heads for later tokens (Gloeckle et al. 2024, arXiv:2404.19737). Each head is a block on the
backbone's hidden states, with the embeddings of the first head. They are used in training, by the objective
`MultiToken`, and as the draft of speculative decoding. Otherwise they are not computed, and the model equals its
`Transformer`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.nn.backbone import Backbone
from gptjax.nn.block import Context
from gptjax.nn.module import ParamFactory
from gptjax.nn.transformer import TransformerConfig
from gptjax.types import Array, Params, UserError


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

    def without_extra_heads(self, params: Params) -> tuple[TransformerConfig, Params]:
        """The decoder alone, which predicts the same, and its parameters."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(TransformerConfig)}
        own = {name: branch for name, branch in params.items() if not name.startswith("ahead_")}
        return TransformerConfig(**fields), own

    def init_ahead_cache(self, pages: int, size: int, rules: ShardingRules = ShardingRules()) -> tuple[Any, ...]:
        """Empty pages of the extra heads, as `init_cache` makes those of the layers."""
        return self._of_head_blocks(self.ahead).init_cache(pages, size, rules, paged=True)

    def flops(self, length: int) -> int:
        """FLOPs with the extra heads, as in training."""
        return super().flops(length) + self.ahead * TransformerConfig.flops(self._of_head_blocks(1), length)

    def _of_head_blocks(self, layers: int) -> Self:
        """The model with these layers, all of the kind that an extra head has."""
        return dataclasses.replace(self, layers=layers, leading_layers=(), pattern=self.pattern[:1], pipeline_chunks=1)


class MultiTokenTransformer(Backbone):
    """`Transformer` with extra heads. In the collection "ahead", if it is mutable, logits [B, T, V] named "0", "1", ...
    of the token after the next one, the one after that, ...

        (logits, cache), sown = model.apply({"params": params}, tokens, mutable=["ahead"])

    With a cache, an argument `ahead` has the heads' own entries, and the output is a triple with the new ones:

        (logits, heads, entries), cache = model.apply({"params": params}, tokens, cache=cache, ahead=entries)
    """

    config: MultiTokenConfig

    def head(self, x: Array, table: Array, context: Context, ahead: tuple[Any, ...] | None = None) -> Any:
        """Logits [B, T, V]. With `ahead`, cache entries of `MultiTokenConfig.init_ahead_cache`, a triple: these, the
        `DeferredLogits` [B, T, A, V] of the A extra heads, and their entries with the new tokens."""
        c, unembedding = self.config, self.unembedding(table)
        logits = self.logits(x, unembedding)
        if ahead is not None:
            heads, entries = self._ahead(x, context, ahead)
            return logits, self.deferred_logits(jnp.stack(heads, axis=2), unembedding), entries
        decodes = context.mask.offset is not None
        if self.is_initializing() or (self.is_mutable_collection("ahead") and not decodes):
            for i, y in enumerate(self._ahead(x, context, (None,) * c.ahead)[0]):
                if not self.is_initializing():
                    nothing = functools.partial(jnp.zeros, ())
                    later = self.logits(y, unembedding, name=str(i))
                    self.sow("ahead", str(i), later, reduce_fn=jnp.add, init_fn=nothing)
        return logits

    def _ahead(self, x: Array, context: Context, entries: tuple[Any, ...]) -> tuple[list[Array], tuple[Any, ...]]:
        """Hidden states [B, T, D] of each extra head, and their cache entries with the new tokens."""
        c, param, found, new = self.config, ParamFactory.for_module(self, self.rules, self.config.dtype), [], []
        for i, entry in enumerate(entries):
            y, entry = c.block(c.pattern[0], self.rules).clone(name=f"ahead_{i}", parent=self)(x, context, entry)
            found.append(c.norm(param.child(f"ahead_norm_{i}"), y))
            new.append(entry)
        return found, tuple(new)
