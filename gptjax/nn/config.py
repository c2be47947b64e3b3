"""Architecture of a model: sizes and parts, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from gptjax.distributed.sharding import ShardingRules
from gptjax.nn.attention import Attention, MultiHeadAttention
from gptjax.nn.block import Block
from gptjax.nn.mixer import SequenceMixer
from gptjax.nn.mlp import MLP, SwiGLU
from gptjax.nn.norms import Norm, RMSNorm
from gptjax.nn.parametrisation import Parametrisation
from gptjax.nn.positions import Positions, RoPE
from gptjax.nn.remat import check
from gptjax.nn.residual import PreNorm, Residual
from gptjax.nn.stack import Stack
from gptjax.protocols import ModelConfig
from gptjax.types import Params, UserError

OF_COMPUTATION = (
    *("dropout", "layer_drop", "remat", "microbatches", "pipeline_chunks"),
    *("dtype", "float8", "cache_dtype"),
)
"""Fields of `BackboneConfig` that say how it is trained and computed, not which model it is."""


@dataclasses.dataclass(frozen=True)
class LayerOverrides:
    """Overrides for some layers of a model. None: the model's own."""

    attention: SequenceMixer | None = None
    """Attention or a recurrent layer."""
    positions: Positions | None = None
    """Position encoding of queries and keys."""
    window: int | None = None
    """Sliding window: number of tokens that each token attends to, itself included."""
    mlp: MLP | None = None
    """Feed-forward part."""
    hidden: int | None = None
    """F, hidden size of the MLP."""
    residual: Residual | None = None
    """Arrangement of attention and MLP around the residual stream."""

    def __post_init__(self):
        for field in ("window", "hidden"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"model.pattern: {field}: got {value}, must be at least 1")


@dataclasses.dataclass(frozen=True)
class BackboneConfig(ModelConfig):
    """Architecture of a `Backbone`: embedding, blocks, final norm, head."""

    causal: ClassVar[bool] = True
    """Causal attention: tokens attend to earlier ones only."""

    vocab: int
    """V, number of token ids."""
    layers: int
    """L, number of blocks."""
    width: int
    """D, size of the residual stream."""
    heads: int
    """N, number of query heads."""
    kv_heads: int | None = None
    """K, number of key/value heads, shared by groups of query heads. None: N."""
    head_size: int | None = None
    """H, head size. None: width / heads."""
    hidden: int | None = None
    """F, hidden size of the MLP. None: 4 x width, or 8/3 x width rounded up to a multiple of 8 if gated."""
    positions: Positions = RoPE()
    """Position encoding."""
    norm: Norm = RMSNorm()
    """Normalisation of the residual stream."""
    attention: SequenceMixer = MultiHeadAttention()
    """Attention or a recurrent layer."""
    mlp: MLP | None = SwiGLU()
    """Feed-forward part. None: blocks without MLP."""
    residual: Residual = PreNorm()
    """Arrangement of attention and MLP around the residual stream."""
    pattern: tuple[LayerOverrides, ...] = (LayerOverrides(),)
    """Pattern that the layers repeat: (LayerOverrides(window=1_024), LayerOverrides()) makes every other layer
    local."""
    leading_layers: tuple[LayerOverrides, ...] = ()
    """Layers before the pattern."""
    bias: bool = False
    """Biases in the linear layers."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention probabilities and residual updates."""
    layer_drop: float = 0.0
    """Probability of skipping a block in training (LayerDrop)."""
    tie_embeddings: bool = True
    """Use the transposed embedding as head."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings: sqrt(width) in Gemma and in "Attention Is All You Need"."""
    token_types: int = 0
    """Number of token types with an embedding: 2 in BERT, for sentences A and B. 0: none."""
    embedding_norm: Norm | None = None
    """Normalisation of the embeddings. None: no normalisation."""
    logit_scale: float = 1.0
    """Factor of the logits."""
    logit_softcap: float | None = None
    """Bound of the logits: softcap * tanh(logit / softcap). None: no bound."""
    cross_attention: Attention | None = None
    """Cross-attention of a decoder to its encoder. None: no encoder."""
    parametrisation: Parametrisation = Parametrisation()
    """Dependence of initial weights, multipliers and learning rates on width and depth."""
    remat: str | tuple[str, ...] | None = None
    """Rematerialisation: a key of `gptjax.nn.remat.POLICIES`, or names of activations to save, of
    `gptjax.nn.remat.NAMES`; NAME@host saves one in the host's memory. None: save all activations; with
    `pipeline_chunks`, matrix products and attention's results."""
    microbatches: int | None = None
    """Number of pipeline microbatches. None: one per pipeline stage."""
    pipeline_chunks: int = 1
    """Chunks of layers per pipeline stage (interleaved schedule): more of them wait less and send more
    (`gptjax.nn.pipeline`)."""
    dtype: str = "float32"
    """Compute dtype: float32 or bfloat16. Parameters are float32 and cast when used."""
    float8: bool = False
    """In training, compute the products of the blocks' matrices in 8 bits (`gptjax.kernels.float8`), which is faster on
    GPUs from compute capability 8.9 on. Embeddings, head, experts, attention scores, evaluation and inference keep the
    compute dtype."""
    cache_dtype: str | None = None
    """Dtype of cached keys and values: int8 or float8_e4m3fn, with a scale per token and head. None: compute dtype."""

    def __post_init__(self):
        for field in ("vocab", "layers", "width", "heads"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}: got {getattr(self, field)}, must be at least 1")
        if self.head_size is None and self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.heads))[:3]
            raise UserError(
                f"model.heads: got {self.heads}, which does not divide model.width {self.width}; "
                f"use {', '.join(map(str, sorted(near)))}, or set model.head_size"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise UserError(f"model.kv_heads: got {self.kv_heads}, must divide model.heads {self.heads}")
        if not self.pattern:
            raise UserError("model.pattern: got none, must be at least one; (LayerOverrides(),) makes all layers alike")
        if len(self.leading_layers) > self.layers:
            raise UserError(
                f"model.leading_layers: got {len(self.leading_layers)}, must be at most model.layers {self.layers}"
            )
        if self.cross_attention is not None and not self.cross_attention.reads_encoder:
            raise UserError(
                f"model.cross_attention: got {type(self.cross_attention).__name__}, must be one that can read "
                "an encoder's output, such as MultiHeadAttention()"
            )
        for overrides in (*self.leading_layers, *self.pattern):
            attention = overrides.attention or self.attention
            if not isinstance(attention, Attention):
                continue
            positions = overrides.positions or attention.positions or self.positions
            positions.check(attention.head_size or self.H)
            if positions.shared and positions != self.positions:
                raise UserError(
                    f"model.pattern: got {positions} for a layer, must be model.positions, which all layers share"
                )
            if self.positions.biased and (attention.heads or self.heads) != self.heads:
                raise UserError(
                    f"model.attention.heads: got {attention.heads} for a layer, must be model.heads {self.heads} with "
                    f"{type(self.positions).__name__}, whose bias all layers share; or choose other model.positions"
                )
        for field in ("dropout", "layer_drop"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"model.{field}: got {getattr(self, field)}, must be at least 0 and less than 1")
        if self.pipeline_chunks < 1 or self.repeats % self.pipeline_chunks:
            raise UserError(
                f"model.pipeline_chunks: got {self.pipeline_chunks}, must be at least 1 and divide {self.repeats}, the "
                "repeats of the pattern of layers"
            )
        check(self.remat)
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype: got {self.dtype!r}, must be float32 or bfloat16")
        if self.cache_dtype not in (None, "int8", "float8_e4m3fn"):
            raise UserError(f"model.cache_dtype: got {self.cache_dtype!r}, must be int8, float8_e4m3fn or none")

    @property
    def H(self) -> int:
        """H, head size."""
        return self.head_size or self.width // self.heads

    @property
    def K(self) -> int:
        """K, number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def F(self) -> int:
        """F, hidden size of the MLP."""
        if self.mlp is None:
            return 0
        return self.hidden or (-(-8 * self.width // 24) * 8 if self.mlp.gated else 4 * self.width)

    @property
    def is_random(self) -> bool:
        """True: training differs from evaluation, and so needs the rng "dropout"."""
        drops = any(block.mlp is not None and block.mlp.drops_tokens for block in self.stack().blocks)
        return bool(self.dropout or self.layer_drop or self.float8 or drops)

    @property
    def max_positions(self) -> int | None:
        return self.positions.max_positions

    @property
    def repeats(self) -> int:
        """Repeats of the pattern, between the leading layers and the rest."""
        return (self.layers - len(self.leading_layers)) // len(self.pattern)

    @property
    def sequential(self) -> bool:
        """True if a layer reads tokens in order, as recurrent ones do."""
        layers = (*self.leading_layers, *self.pattern)
        return any((layer.attention or self.attention).sequential for layer in layers)

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        layers = "model.layers" if self.pipeline_chunks == 1 else "model.layers / model.pipeline_chunks"
        found = [
            *super().axes,
            ("embed", "model.width", self.width),
            ("layers", layers, self.repeats // self.pipeline_chunks),
        ]
        for side in ("leading_layers", "pattern"):
            for i, overrides in enumerate(getattr(self, side)):
                found += self._layer_axes(overrides, f"model.{side}.{i}")
        return tuple(dict.fromkeys(found))

    def _layer_axes(self, overrides: LayerOverrides, path: str) -> Iterator[tuple[str, str, int]]:
        """`axes` of a layer, whose overrides are the field `path`."""
        block = self.block(overrides)
        own = "model" if overrides.attention is None else path
        for field, part in ((f"{own}.attention", block.attention), ("model.cross_attention", block.cross_attention)):
            if isinstance(part, Attention) and part.heads is not None:
                yield "heads", "model.heads" if part.heads == self.heads else f"{field}.heads", part.heads
        if block.mlp is not None:
            yield "ffn", "model.hidden" if overrides.hidden is None else f"{path}.hidden", block.hidden
        for part in (block.attention, block.mlp):
            yield from () if part is None else part.axes

    def unstack(self, params: Params) -> Params:
        return {**params, "blocks": self.stack().unstack(params["blocks"])}

    @property
    def width_multiplier(self) -> float:
        """Width divided by the width that the hyperparameters were tuned at; see `parametrisation`."""
        return self.parametrisation.width_multiplier(self.width)

    def block(self, overrides: LayerOverrides = LayerOverrides(), rules: ShardingRules = ShardingRules()) -> Block:
        """A layer of the model."""

        def sized(attention: SequenceMixer, overrides: LayerOverrides) -> Any:
            if not isinstance(attention, Attention):
                return attention
            own, size = attention.heads is not None, attention.head_size or self.H
            return dataclasses.replace(
                attention,
                heads=attention.heads or self.heads,
                kv_heads=attention.kv_heads or (attention.heads if own else self.K),
                head_size=size,
                scale=attention.multiplier(size) * self.parametrisation.attention(size),
                positions=overrides.positions or attention.positions or self.positions,
                window=overrides.window or attention.window,
                bias=self.bias if attention.bias is None else attention.bias,
            )

        return Block(
            attention=sized(overrides.attention or self.attention, overrides),
            mlp=overrides.mlp or self.mlp,
            hidden=overrides.hidden or self.F,
            norm=self.norm,
            residual=overrides.residual or self.residual,
            cross_attention=None if self.cross_attention is None else sized(self.cross_attention, LayerOverrides()),
            bias=self.bias,
            dropout=self.dropout,
            layer_drop=self.layer_drop,
            output_scale=self.parametrisation.residual_init_scale(self.layers),
            hidden_init_scale=self.parametrisation.hidden_init_scale(self.width),
            rules=rules,
            dtype=self.dtype,
            float8=self.float8,
            parent=None,
        )

    def stack(self, rules: ShardingRules = ShardingRules()) -> Stack:
        """Layers of the model."""
        leading, pattern = (tuple(self.block(v, rules) for v in side) for side in (self.leading_layers, self.pattern))
        repeats, rest = divmod(self.layers - len(leading), len(pattern))
        chunks = self.pipeline_chunks
        return Stack(pattern, repeats, leading, pattern[:rest], self.remat, self.microbatches, chunks, rules)

    def with_dtype(self, dtype: str) -> Self:
        return dataclasses.replace(self, dtype=dtype)

    def for_context_length(self, length: int) -> Self:
        """This model for texts of up to `length` tokens, which `LongRoPE` depends on."""

        def longer(overrides: LayerOverrides) -> LayerOverrides:
            positions = None if overrides.positions is None else overrides.positions.for_context_length(length)
            return dataclasses.replace(overrides, positions=positions)

        variants = {
            "leading_layers": tuple(map(longer, self.leading_layers)),
            "pattern": tuple(map(longer, self.pattern)),
        }
        return dataclasses.replace(self, positions=self.positions.for_context_length(length), **variants)

    def flops(self, length: int) -> int:
        """FLOPs of training on one token, forward and backward, at this context length: 6 for every weight of a matrix
        product, and 12 D T per layer for attention scores and sums (PaLM, arXiv:2204.02311, appendix B; not halved for
        causality, as usual)."""
        layers = sum(
            part.matmul_params(self.width, size)
            for block in self.stack().blocks
            for part, size in ((block.attention, length), (block.cross_attention, length), (block.mlp, block.hidden))
            if part is not None
        )
        return 6 * (layers + self.vocab * self.width)
