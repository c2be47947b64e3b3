"""Multi-head attention with grouped queries, any position encoding and the usual additions, as a part (`module.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.module import ParamFactory, normal, zeros
from gptjax.nn.norms import Norm
from gptjax.nn.positions import Positions
from gptjax.nn.value_embedding import ValueEmbedding
from gptjax.nn.value_residual import ValueResidual
from gptjax.types import Array, Key, UserError


@dataclasses.dataclass(frozen=True)
class Attention:
    """A part `attention(param, x [B, T, D], positions, mask, ...) -> (y [B, T, D], slots)`.

    Sizes that are None are the model's: `TransformerConfig` fills them in.
    """

    heads: int | None = None
    """N, the number of query heads; none: the model's."""
    head_size: int | None = None
    """H, the size of a head; none: the model's."""
    kv_heads: int | None = None
    """K, the number of key/value heads that queries share in groups (1: multi-query); none: the model's or N."""
    positions: Positions | None = None
    """Position encoding that turns queries and keys; none: the model's."""
    bias: bool | None = None
    """Whether the projections have biases; none: as the model's linear layers."""
    window: int | None = None
    """Each token sees this many tokens, itself included; none: all before it."""
    scale: float | None = None
    """What scores are multiplied by, at the base's head size in muP; none: 1 / sqrt(head size)."""

    def __post_init__(self):
        for field in ("heads", "head_size", "kv_heads", "window"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"model.attention.{field}: got {value}, must be at least 1")

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        positions: Array,
        mask: Mask = Mask(),
        slots: Any = None,
        *,
        bias: Array | None = None,
        source: Any = None,
        tokens: Array | None = None,
        first: Array | None = None,
        output_scale: float = 1.0,
        dropout: float = 0.0,
        key: Key | None = None,
    ) -> tuple[Array, Any]:
        """x [B, T, D], positions int32 [B, T] -> y [B, T, D].

        slots         for incremental decoding, those of a `Cache`, which may lack the axis of rows where B is 1; they
                      come back with the T new entries written at `mask.start`
        bias          float [N, T, S], added to the scores
        source        [B, S, D], what keys and values are of, or what `memory` made of it: cross-attention; None: x
        tokens        int32 [B, T], what x is of, for parts that embed it once more
        first         [B, T, K, H], values of the stack's first layer, for parts that mix them in; None: this is it
        output_scale  multiplies the initial output weights: 1/sqrt(2 L) in GPT-2, to keep a sum of L blocks small
        dropout       share of the probabilities to drop, when there is a key
        """
        raise NotImplementedError

    def memory(self, param: ParamFactory, source: Array) -> Any:
        """What cross-attention keeps of a source [B, S, D], so that decoding projects it once."""
        raise NotImplementedError

    def slots(self, batch: int, size: int, dtype: str, rules: ShardingRules = ShardingRules()) -> Any:
        """What a cache of `size` slots keeps for this layer, empty."""
        raise NotImplementedError

    def matmul_params(self, width: int, length: int) -> int:
        """Multiplications for a token that sees `length` others: weights of matrix products, scores and sums."""
        raise NotImplementedError

    @property
    def mixes(self) -> bool:
        """Whether it wants the values of the first layer."""
        return False

    def multiplier(self, head_size: int) -> float:
        """What scores are multiplied by, with heads of this size."""
        return head_size**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class MultiHeadAttention(Attention):
    """o(concat_n softmax(q_n k_n^T / sqrt(H)) v_n), "Attention Is All You Need", arXiv:1706.03762, section 3.2.2.

    layer = Layer(part=MultiHeadAttention(heads=8, head_size=64))
    y, _ = layer.apply(params, x, positions)                     # x [B, T, D], positions int32 [B, T] -> y [B, T, D]
    """

    output_bias: bool | None = None
    """Whether the output projection has a bias; none: as the others."""
    qk_norm: Norm | None = None
    """Normalises queries and keys before they are turned (arXiv:2302.05442); none: leaves them."""
    joint_qk_norm: bool = False
    """Whether `qk_norm` is over all heads at once, as in OLMo 2, or over each alone."""
    softcap: float | None = None
    """Scores are bounded by this: softcap * tanh(score / softcap), as in Gemma 2; none: they are not."""
    values: ValueEmbedding | ValueResidual | None = None
    """Adds a learned value for each token to what x gives, or the first layer's values; none: nothing is added."""
    sinks: bool = False
    """Whether each head has a learned score for attending to nothing, as in gpt-oss."""
    implementation: str | None = None
    """Which form of `kernels.attention` to use, by name; none: what suits the device, the mask and the options."""

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        positions: Array,
        mask: Mask = Mask(),
        slots: tuple[Array, Array] | None = None,
        *,
        bias: Array | None = None,
        source: Array | tuple[Array, Array] | None = None,
        tokens: Array | None = None,
        first: Array | None = None,
        output_scale: float = 1.0,
        dropout: float = 0.0,
        key: Key | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        rules, width = param.rules, x.shape[-1]
        N, K, H = self._sizes()
        has_output_bias = self.bias if self.output_bias is None else self.output_bias

        def turned(x: Array) -> Array:
            return self.positions.rotate(x, positions) if self.positions is not None else x

        q = self._project(param, "q", x)
        if source is None:
            q, k, v = turned(q), turned(self._project(param, "k", x)), self._project(param, "v", x)
            param.capture("values", v)
            v = v if self.values is None else self.values(param.scope("values"), v, x, tokens, first)
        else:
            memory = source if isinstance(source, tuple) else self.memory(param, source)
            k, v = (kept.reshape(x.shape[0], K, -1, H).swapaxes(1, 2) for kept in memory)
        if slots is not None:
            keys, values = (
                kv.write(filled, new.swapaxes(1, 2), mask.start, axis=-2)
                for filled, new in zip(slots, (k, v), strict=True)
            )
            slots = keys, values
            k, v = (filled.reshape(x.shape[0], K, -1, H).swapaxes(1, 2) for filled in slots)
        if self.window is not None:
            mask = dataclasses.replace(mask, window=self.window)
        sinks = param("sinks", (N,), ("heads",), normal, decays=True) if self.sinks else None
        y = attention(
            *(q, k, v, mask),
            bias=bias,
            sinks=sinks,
            scale=self.scale,
            softcap=self.softcap,
            dropout=dropout,
            key=key,
            implementation=self.implementation,
        )
        init = jax.nn.initializers.normal(0.02 * output_scale)
        o = param("o", (N, H, width), ("heads", None, "embed"), init, inputs=2)
        y = linear(y, o, rules("batch", "sequence", None), contract=2)
        return y + param("o_bias", (width,), (None,), zeros) if has_output_bias else y, slots

    @property
    def mixes(self) -> bool:
        return isinstance(self.values, ValueResidual)

    def memory(self, param: ParamFactory, source: Array) -> tuple[Array, Array]:
        """Keys and values, [B, K, S, H] each."""
        return self._project(param, "k", source).swapaxes(1, 2), self._project(param, "v", source).swapaxes(1, 2)

    def slots(self, batch: int, size: int, dtype: str, rules: ShardingRules = ShardingRules()) -> tuple[Array, Array]:
        """Keys and values, [B, K, S, H] each: the order in which attention reads them."""
        _, K, H = self._sizes()
        sharding = rules("batch", rules.axis_if_divisible("kv_heads", K), None, None)
        keys, values = (jnp.zeros((batch, K, size, H), dtype, out_sharding=sharding) for _ in range(2))
        return keys, values

    def matmul_params(self, width: int, length: int) -> int:
        N, K, H = self._sizes()
        return 2 * width * H * (N + K) + 2 * N * H * min(length, self.window or length)

    def _project(self, param: ParamFactory, name: str, x: Array) -> Array:
        """x [B, T, D] -> queries "q" [B, T, N, H], or keys "k" or values "v" [B, T, K, H], normalised by `qk_norm`."""
        N, K, H = self._sizes()
        heads, axis = (N, "heads") if name == "q" else (K, param.rules.axis_if_divisible("kv_heads", K))
        w = param(name, (x.shape[-1], heads, H), ("embed", axis, None))
        y = linear(x, w, param.rules("batch", "sequence", axis, None))
        if self.bias:
            y = y + param(f"{name}_bias", (heads, H), (axis, None), zeros, kind="other")
        if self.qk_norm is None or name == "v":
            return y
        together = (*y.shape[:2], -1) if self.joint_qk_norm else y.shape
        return self.qk_norm(param.scope(f"{name}_norm"), y.reshape(together)).reshape(y.shape)

    def _sizes(self) -> tuple[int, int, int]:
        if self.heads is None or self.head_size is None:
            raise UserError("attention: got no heads or head_size; outside a model both must be given")
        return self.heads, self.kv_heads or self.heads, self.head_size
