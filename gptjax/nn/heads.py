"""Heads for whole texts, over the hidden states of an encoder or a decoder.

    model = Classifier(ClassifierConfig(config, classes=3, pooling=Mean()))
    params = model.init(jax.random.key(0), tokens)["params"] | pretrained
    logits, _ = model.apply({"params": params}, tokens, positions, segments, documents=1)            # [B, 1, 3]

The backbone's parameters have the names of a language model's, so that pretrained ones can be used as above. A sequence
may have several texts, segments 1 .. M. Padding has segment 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from jax import lax

from gptjax.distributed.sharding import ShardingRules, reshard
from gptjax.kernels.linear import linear
from gptjax.nn.backbone import Backbone
from gptjax.nn.block import Context
from gptjax.nn.config import BackboneConfig, ModelConfig
from gptjax.nn.mlp import GELU, MLP
from gptjax.nn.module import ParamFactory, Part, zeros
from gptjax.nn.norms import LayerNorm, Norm
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Pooling of a text's hidden states: x_m = sum_t weight_mt x_t. A subclass defines the weights."""

    def weights(self, inside: Array) -> Array:
        """inside bool [B, M, T], True if token t is of text m -> weights float [B, M, T]."""
        raise NotImplementedError

    def __call__(
        self, x: Array, segments: Array | None, documents: int, rules: ShardingRules = ShardingRules()
    ) -> Array:
        """x [B, T, D], segments int32 [B, T] (None: all 1) -> [B, M, D]; 0 for missing texts."""
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else jnp.asarray(segments)
        whole = reshard(segments, rules("batch", None))  # `weights` counts along sequences
        inside = whole[:, None, :] == jnp.arange(1, documents + 1)[:, None]
        weights = reshard(self.weights(inside).astype(x.dtype), rules("batch", None, "sequence"))
        return lax.dot_general(weights, x, (((2,), (1,)), ((0,), (0,))), out_sharding=rules("batch", None, None))


class Mean(Pooling):
    """Mean of all tokens: sentence embeddings (arXiv:1908.10084)."""

    def weights(self, inside: Array) -> Array:
        return inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)


class First(Pooling):
    """First token, BERT's [CLS]: for encoders."""

    def weights(self, inside: Array) -> Array:
        return inside & (jnp.cumsum(inside, -1) == 1)


class Last(Pooling):
    """Last token, which attends to the whole text in a decoder."""

    def weights(self, inside: Array) -> Array:
        return inside & (jnp.cumsum(inside, -1) == inside.sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Pooler(Part):
    """BERT's pooler before the classifier: tanh(x W + b) (arXiv:1810.04805).

    A part `pooler(param, x [B, M, D]) -> [B, M, D]`.
    """

    def __call__(self, param: ParamFactory, x: Array) -> Array:
        width = x.shape[-1]
        y = linear(x, param("dense", (width, width), ("embed", None)), param.rules("batch", None, None))
        return jnp.tanh(y + param("dense_bias", (width,), (None,), zeros))


@dataclasses.dataclass(frozen=True)
class NormedPooler(Pooler):
    """ModernBERT's pooler before the classifier: norm(act(x W + b)) (arXiv:2412.13663)."""

    mlp: MLP = GELU(approximate=False)
    """MLP whose activation is used."""
    norm: Norm = LayerNorm()
    """Normalisation."""
    bias: bool = False
    """Add b."""

    def __call__(self, param: ParamFactory, x: Array) -> Array:
        width = x.shape[-1]
        y = linear(x, param("dense", (width, width), ("embed", None)), param.rules("batch", None, None))
        y = y + param("dense_bias", (width,), (None,), zeros) if self.bias else y
        return self.norm(param.scope("norm"), self.mlp.activation(y))


@dataclasses.dataclass(frozen=True)
class HeadConfig(ModelConfig):
    """A head over the hidden states of a decoder or an encoder. Base class."""

    backbone: BackboneConfig
    """Decoder or encoder of the text."""

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

    def flops(self, length: int) -> int:
        """FLOPs as `BackboneConfig.flops`, without the small head."""
        return self.backbone.flops(length) - 6 * self.vocab * self.backbone.width

    def with_dtype(self, dtype: str) -> Self:
        return dataclasses.replace(self, backbone=self.backbone.with_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(HeadConfig):
    """Text classifier over a decoder or an encoder."""

    architecture = "classifier"

    classes: int
    """C, number of classes."""
    pooling: Pooling = Last()
    """Pooling of the tokens' hidden states: `Last()` for decoders, `First()` or `Mean()` for encoders."""
    pooler: Pooler | None = None
    """Layer between pooling and classifier. None: no layer."""
    bias: bool = False
    """Bias in the classifier."""

    def __post_init__(self):
        if self.classes < 2:
            raise UserError(f"model.classes: got {self.classes}, must be at least 2")

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return Classifier(self, rules)


@dataclasses.dataclass(frozen=True)
class TokenClassifierConfig(HeadConfig):
    """Classifier of each token over a decoder or an encoder: names in a text, or the steps of a solution."""

    architecture = "token-classifier"

    classes: int
    """C, number of classes."""
    bias: bool = True
    """Bias in the classifier."""

    def __post_init__(self):
        if self.classes < 2:
            raise UserError(f"model.classes: got {self.classes}, must be at least 2")

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return TokenClassifier(self, rules)


@dataclasses.dataclass(frozen=True)
class SpanExtractorConfig(HeadConfig):
    """Scores of each token as the first and as the last of an answer, over a decoder or an encoder."""

    architecture = "span-extractor"
    classes: ClassVar[int] = 2

    bias: bool = True
    """Bias of the scores."""

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return SpanExtractor(self, rules)


@dataclasses.dataclass(frozen=True)
class RegressorConfig(HeadConfig):
    """One number per text over a decoder or an encoder: a reward model, or a regression."""

    architecture = "regressor"
    classes: ClassVar[int] = 1

    pooling: Pooling = Last()
    """Pooling of the tokens' hidden states: `Last()` for decoders, `First()` or `Mean()` for encoders."""
    pooler: Pooler | None = None
    """Layer between pooling and the number. None: no layer."""
    bias: bool = False
    """Bias of the number."""

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return Classifier(self, rules)


@dataclasses.dataclass(frozen=True)
class EmbedderConfig(HeadConfig):
    """A vector per text over a decoder or an encoder."""

    architecture = "embedder"

    pooling: Pooling = Mean()
    """Pooling of the tokens' hidden states."""
    normalise: bool = True
    """Divide vectors by their norm, so that dot products are cosines."""

    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        return Embedder(self.backbone, rules, pooling=self.pooling, normalise=self.normalise)


class Classifier(Backbone):
    """Tokens to class logits, pool(h) W, with h the hidden states of a text after the final norm: GPT with `Last()`
    (Radford et al. 2018, section 3.2). BERT has tanh(pool(h) P + p) W + b (arXiv:1810.04805, section 4.1): `First()`,
    `Pooler()` and a bias. A regressor has one logit, its number."""

    config: ClassifierConfig | RegressorConfig

    @property
    def backbone(self) -> BackboneConfig:
        return self.config.backbone

    def head(self, x: Array, table: Array, context: Context, documents: int = 1) -> Array:
        """Logits [B, M, C] of the M = `documents` texts of each sequence."""
        c = self.config
        scale = c.backbone.parametrisation.hidden_init_scale(c.backbone.width)
        param = ParamFactory.for_module(self, self.rules, c.backbone.dtype, scale)
        x = c.pooling(x, context.mask.query_segments, documents, self.rules)
        if c.pooler is not None:
            x = c.pooler(param.child("pooler"), x)
        w = param("classifier", (c.backbone.width, c.classes), ("embed", None), kind="head")
        logits = linear(x, w, self.rules("batch", None, None)) / c.width_multiplier
        return logits + param("classifier_bias", (c.classes,), (None,), zeros) if c.bias else logits


class TokenClassifier(Backbone):
    """Tokens to class logits of each token, h W + b, with h its hidden state after the final norm (Devlin et al. 2018,
    arXiv:1810.04805, section 5.3)."""

    config: TokenClassifierConfig | SpanExtractorConfig
    parameter: ClassVar[str] = "token_classifier"
    """Name of W, and of b with "_bias"."""

    @property
    def backbone(self) -> BackboneConfig:
        return self.config.backbone

    def head(self, x: Array, table: Array, context: Context) -> Array:
        """Logits [B, T, C]."""
        c = self.config
        param = ParamFactory.for_module(self, self.rules, c.backbone.dtype)
        w = param(self.parameter, (c.backbone.width, c.classes), ("embed", None), kind="head")
        logits = linear(x, w, self.rules("batch", "sequence", None)) / c.width_multiplier
        return logits + param(f"{self.parameter}_bias", (c.classes,), (None,), zeros) if c.bias else logits


class SpanExtractor(TokenClassifier):
    """Tokens to two logits of each: as the first and as the last token of an answer (Devlin et al. 2018, section
    4.2)."""

    parameter: ClassVar[str] = "span_extractor"


class Embedder(Backbone):
    """Tokens to one vector per text, v / |v| with v = pool(h), h the hidden states of a text after the final norm:
    Sentence-BERT (Reimers and Gurevych 2019, arXiv:1908.10084). Its parameters are the backbone's."""

    pooling: Pooling = Mean()
    normalise: bool = True
    """Divide vectors by their norm, so that dot products are cosines."""

    def head(self, x: Array, table: Array, context: Context, documents: int = 1) -> Array:
        """float32 [B, M, D], one vector for each of the M = `documents` texts of a sequence."""
        x = self.pooling(x, context.mask.query_segments, documents, self.rules).astype(jnp.float32)
        # The norm of a missing text, 0, has no gradient; its square has.
        return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24)) if self.normalise else x
