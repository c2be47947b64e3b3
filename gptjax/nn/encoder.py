"""Bidirectional encoder with a head for masked tokens: BERT.

Classifiers and embedders over an encoder are in `heads.py`, encoder-decoders in `encoder_decoder.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.linear import linear
from gptjax.nn.backbone import Backbone
from gptjax.nn.block import Context
from gptjax.nn.config import BackboneConfig
from gptjax.nn.mlp import GELU, MLP
from gptjax.nn.module import ParamFactory, Part, zeros
from gptjax.nn.norms import Norm
from gptjax.types import Array


@dataclasses.dataclass(frozen=True)
class Transform(Part):
    """BERT's transform before the output embeddings: norm(act(x W + b)) (arXiv:1810.04805).

    A part `transform(param, x [B, T, D], norm) -> [B, T, D]`.
    """

    mlp: MLP = GELU(approximate=False)
    """MLP whose activation is used."""
    bias: bool = True
    """Add b."""

    def __call__(self, param: ParamFactory, x: Array, norm: Norm) -> Array:
        width = x.shape[-1]
        y = linear(x, param("dense", (width, width), ("embed", None)), param.rules("batch", "sequence", None))
        y = y + param("dense_bias", (width,), (None,), zeros) if self.bias else y
        return norm(param.scope("norm"), self.mlp.activation(y))


@dataclasses.dataclass(frozen=True)
class EncoderConfig(BackboneConfig):
    """Architecture of an encoder. BERT is

    EncoderConfig(
        vocab=30_522, layers=12, width=768, heads=12, positions=LearnedPositions(512), norm=LayerNorm(eps=1e-12),
        mlp=GELU(approximate=False), residual=PostNorm(), bias=True, embedding_norm=LayerNorm(eps=1e-12),
        token_types=2, transform=Transform(), dropout=0.1,
    )
    """

    architecture = "encoder"
    causal = False

    transform: Transform | None = None
    """Transform between hidden states and head, which then has a bias too. None: neither."""

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return Encoder(self, rules)


class Encoder(Backbone):
    """Tokens, some of them masked, to logits of the original tokens: BERT (Devlin et al. 2018, arXiv:1810.04805). With
    h the hidden states of bidirectional blocks, E the embeddings:

        logits = h E^T,    with a `transform`    logits = transform(h) E^T + b

        model = Encoder(EncoderConfig(vocab=256, layers=4, width=128, heads=4))
        params = model.init(jax.random.key(0), tokens)["params"]
        logits, _ = model.apply({"params": params}, tokens)                     # [B, T] -> [B, T, V]

    The arguments are those of `Backbone`, except for decoding.
    """

    config: EncoderConfig

    def head(self, x: Array, table: Array, context: Context) -> Array:
        c = self.config
        if c.transform is None:
            return self.logits(x, self.unembedding(table))
        param = ParamFactory.for_module(self, self.rules, c.dtype, c.parametrisation.hidden_init_scale(c.width))
        x = c.transform(param.child("transform"), x, c.norm)
        bias = param("head_bias", (c.vocab,), ("vocab",), zeros)
        return self.logits(x, self.unembedding(table), bias)
