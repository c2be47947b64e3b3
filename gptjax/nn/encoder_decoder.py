"""Encoder-decoder: the source is encoded once, the target is generated with cross-attention to it. This is T5.

    config = EncoderDecoderConfig(
        encoder=EncoderConfig(vocab=256, layers=4, width=128, heads=4),
        decoder=TransformerConfig(vocab=256, layers=4, width=128, heads=4, cross_attention=MultiHeadAttention()),
    )
    model = EncoderDecoder(config)
    params = model.init(jax.random.key(0), tokens)["params"]
    logits, _ = model.apply({"params": params}, tokens, source=source)                # [B, T] and [B, S] -> [B, T, V]

A `dict` can hold their common settings. "Attention Is All You Need" (arXiv:1706.03762) is

    common = dict(
        vocab=37_000, layers=6, width=512, heads=8, hidden=2_048, positions=Sinusoidal(), norm=LayerNorm(), mlp=ReLU(),
        residual=PostNorm(), bias=True, embedding_scale=512**0.5, dropout=0.1,
    )
    EncoderDecoderConfig(EncoderConfig(**common), TransformerConfig(**common, cross_attention=MultiHeadAttention()))

and T5 small (arXiv:1910.10683), which does not scale scores by the head size, is

    attention = MultiHeadAttention(scale=1.0)
    common = dict(
        vocab=32_128, layers=6, width=512, heads=8, hidden=2_048, positions=T5Bias(), norm=RMSNorm(eps=1e-6),
        mlp=ReLU(), attention=attention, dropout=0.1,
    )
    EncoderDecoderConfig(
        EncoderConfig(**common), TransformerConfig(**common, cross_attention=attention, logit_scale=512**-0.5)
    )
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.nn import cache as kv
from gptjax.nn.backbone import Backbone
from gptjax.nn.cache import Cache
from gptjax.nn.config import ModelConfig
from gptjax.nn.encoder import EncoderConfig
from gptjax.nn.module import ParamFactory
from gptjax.nn.transformer import Transformer, TransformerConfig
from gptjax.types import Array, Params, UserError


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(ModelConfig):
    """Encoder and decoder with a common embedding table."""

    architecture = "encoder-decoder"

    encoder: EncoderConfig
    """Encoder of the source."""
    decoder: TransformerConfig
    """Decoder of the target, with `cross_attention`."""

    def __post_init__(self):
        if self.decoder.cross_attention is None:
            raise UserError(
                "model.decoder.cross_attention: got none, must be an attention part, such as MultiHeadAttention()"
            )
        for field in ("vocab", "width", "dtype"):
            ours, theirs = getattr(self.decoder, field), getattr(self.encoder, field)
            if ours != theirs:
                raise UserError(f"model.decoder.{field}: got {ours}, must be that of the encoder, {theirs}")

    @property
    def vocab(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (nobody sets it)
        return self.decoder.vocab

    @property
    def max_positions(self) -> int | None:
        return self.decoder.max_positions

    @property
    def max_source_positions(self) -> int | None:
        return self.encoder.max_positions

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        return tuple(
            (axis, field.replace("model.", f"model.{name}.", 1), size)
            for name, half in (("encoder", self.encoder), ("decoder", self.decoder))
            for axis, field, size in half.axes
        )

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return EncoderDecoder(self, rules)

    def with_dtype(self, dtype: str) -> Self:
        halves = {name: getattr(self, name).with_dtype(dtype) for name in ("encoder", "decoder")}
        return dataclasses.replace(self, **halves)

    def flops(self, length: int) -> int:
        """FLOPs per target token and source token, for equal lengths. The encoder has no head."""
        return self.encoder.flops(length) + self.decoder.flops(length) - 6 * self.vocab * self.encoder.width

    def unstack(self, params: Params) -> Params:
        halves = {name: getattr(self, name).unstack(params[name]) for name in ("encoder", "decoder")}
        return {**params, **halves}


class EncoderDecoder(nn.Module):
    """Source and target tokens to logits of the next target tokens."""

    config: EncoderDecoderConfig
    rules: ShardingRules = ShardingRules()

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        *,
        source: Array | None = None,
        source_positions: Array | None = None,
        source_segments: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """tokens int32 [B, T] -> logits [B, T, V] in the compute dtype, and the cache with T more tokens.

        source            int32 [B, S]. None: in the cache, by `encode`
        source_positions  int32 [B, S], positions within the document. None: 0 .. S-1
        source_segments   int32 [B, S]; source and target tokens attend to their own segment only. None: all 1,
                          and so must the target's be

        The others are those of `Transformer`.
        """
        c, rules = self.config, self.rules
        param = ParamFactory.for_module(self, rules, c.decoder.dtype)
        table = param("embedding", (c.vocab, c.decoder.width), ("vocab", "embed"), kind="embedding")
        if source is None and self.is_initializing():
            source = tokens  # no parameter depends on its values
        if source is None and cache is None:
            raise UserError("source: got none, must be given without a cache from `encode`")
        encoded = None
        if source is not None:
            encoder = Backbone(c.encoder, rules, name="encoder")
            encoded, _ = encoder(source, source_positions, source_segments, table=table)
        decoder = Transformer(c.decoder, rules, name="decoder")
        options = {"encoder_output": encoded, "source_segments": source_segments}
        return decoder(tokens, positions, segments, cache, table=table, **options)


def encode(
    model: EncoderDecoder,
    params: Params,
    source: Array,
    size: int,
    positions: Array | None = None,
    segments: Array | None = None,
) -> Cache:
    """Encode a source int32 [B, S] into a cache for `size` target tokens: it has the keys and values of
    cross-attention, and no target tokens. Positions and segments are those of the source."""
    c, rules = model.config, model.rules
    decoder = c.decoder
    encoder_params = {**params["encoder"], "embedding": params["embedding"]}
    encoded, _ = Backbone(c.encoder, rules).apply({"params": encoder_params}, source, positions, segments)
    stack, own = decoder.stack(rules), decoder.init_cache(source.shape[0], size, rules)

    def cross_cache(layer: int) -> Any:
        attention = stack.blocks[layer].cross_attention
        assert attention is not None
        module = attention.module(rules, decoder.dtype, method="init_cross_cache")
        return module.apply({"params": stack.layer(params["decoder"]["blocks"], layer)["cross_attention"]}, encoded)

    entries = tuple((entry, cross_cache(layer)) for layer, entry in enumerate(own))
    cache = kv.empty(entries, source.shape[0], size, rules("batch"))
    return dataclasses.replace(cache, source_segments=jnp.ones_like(source) if segments is None else segments)
