"""Heads that say something of a whole text, over the hidden states of an encoder or a decoder.

    model = Classifier(ClassifierConfig(config, classes=3, pooling=Mean()))
    params = model.init(jax.random.key(0), tokens)["params"] | pretrained
    logits, _ = model.apply({"params": params}, tokens, positions, segments, documents=1)            # [B, 1, 3]

The backbone's parameters have the same names as in a language model, so one can be put in as above. A row may hold
several texts, one after the other, with segments 1 .. M; padding has segment 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from jax import lax

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.linear import linear
from gptjax.nn.backbone import Backbone
from gptjax.nn.block import Context
from gptjax.nn.config import BackboneConfig, ModelConfig
from gptjax.nn.module import ParamFactory, Part, zeros
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become one: x_m = sum_t share_mt x_t. A subclass says the shares."""

    def share(self, inside: Array) -> Array:
        """inside bool [B, M, T], whether token t is of text m -> share float [B, M, T]."""
        raise NotImplementedError

    def __call__(self, x: Array, segments: Array | None, documents: int) -> Array:
        """x [B, T, D], segments int32 [B, T] (None: all 1) -> [B, M, D]; 0 for a text that is not there."""
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else jnp.asarray(segments)
        inside = segments[:, None, :] == jnp.arange(1, documents + 1)[:, None]
        share = self.share(inside).astype(x.dtype)
        return lax.dot_general(share, x, (((2,), (1,)), ((0,), (0,))))


class Mean(Pooling):
    """The mean of all tokens: sentence embeddings (arXiv:1908.10084)."""

    def share(self, inside: Array) -> Array:
        return inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)


class First(Pooling):
    """The first token, as BERT's [CLS]: for encoders."""

    def share(self, inside: Array) -> Array:
        return inside & (jnp.cumsum(inside, -1) == 1)


class Last(Pooling):
    """The last token, which in a decoder is the one that has seen all."""

    def share(self, inside: Array) -> Array:
        return inside & (jnp.cumsum(inside, -1) == inside.sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Pooler(Part):
    """What BERT does to a text's state before it meets the classes: tanh(x W + b) (arXiv:1810.04805).

    A part `pooler(param, x [B, M, D]) -> [B, M, D]`.
    """

    def __call__(self, param: ParamFactory, x: Array) -> Array:
        width = x.shape[-1]
        y = linear(x, param("dense", (width, width), ("embed", None)), param.rules("batch", None, None))
        return jnp.tanh(y + param("dense_bias", (width,), (None,), zeros))


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
    """A decoder or an encoder that tells of which class a text is."""

    architecture = "classifier"

    backbone: BackboneConfig
    """What reads the text."""
    classes: int
    """C, how many there are."""
    pooling: Pooling = Last()
    """How the states of its tokens become one: `First()` or `Mean()` in an encoder."""
    pooler: Pooler | None = None
    """What is between that state and the classes; none: nothing."""
    bias: bool = False
    """Whether the classes have a bias."""

    def __post_init__(self):
        if self.classes < 2:
            raise UserError(f"model.classes: got {self.classes}, must be at least 2")

    @property
    def vocab(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (nobody sets it)
        return self.backbone.vocab

    @property
    def max_positions(self) -> int | None:
        return self.backbone.max_positions

    @property
    def width_multiplier(self) -> float:
        return self.backbone.width_multiplier

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        return tuple(
            (axis, field.replace("model.", "model.backbone.", 1), size) for axis, field, size in self.backbone.axes
        )

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return Classifier(self, rules)

    def flops(self, length: int) -> int:
        """Without those of a text's classes, which are few."""
        return self.backbone.flops(length) - 6 * self.vocab * self.backbone.width

    def with_dtype(self, dtype: str) -> Self:
        return dataclasses.replace(self, backbone=self.backbone.with_dtype(dtype))


class Classifier(Backbone):
    """Tokens to logits of classes, pool(h) W, with h the hidden states of a text after the final norm: GPT with
    `Last()` (Radford et al. 2018, section 3.2). BERT has tanh(pool(h) P + p) W + b (arXiv:1810.04805, section 4.1),
    which is `First()`, a `Pooler()` and a bias."""

    config: ClassifierConfig

    @property
    def backbone(self) -> BackboneConfig:
        return self.config.backbone

    def head(self, x: Array, table: Array, context: Context, documents: int = 1) -> Array:
        """Logits [B, M, C] of the texts of each row, M = `documents`."""
        c = self.config
        scale = c.backbone.parametrisation.hidden_init_scale(c.backbone.width)
        param = ParamFactory.for_module(self, self.rules, c.backbone.dtype, scale)
        x = c.pooling(x, context.mask.query_segments, documents)
        if c.pooler is not None:
            x = c.pooler(param.child("pooler"), x)
        w = param("classifier", (c.backbone.width, c.classes), ("embed", None), kind="head")
        logits = linear(x, w, self.rules("batch", None, None)) / c.width_multiplier
        return logits + param("classifier_bias", (c.classes,), (None,), zeros) if c.bias else logits


class Embedder(Backbone):
    """Tokens to one vector a text, v / |v| with v = pool(h), h the hidden states of a text after the final norm:
    Sentence-BERT (Reimers and Gurevych 2019, arXiv:1908.10084). It has no parameters but the backbone's."""

    pooling: Pooling = Mean()
    normalise: bool = True
    """Whether vectors are divided by their length, so that their products are cosines."""

    def head(self, x: Array, table: Array, context: Context, documents: int = 1) -> Array:
        """float32 [B, M, D], one vector for each of the M = `documents` texts of a row."""
        x = self.pooling(x, context.mask.query_segments, documents).astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if self.normalise else x
