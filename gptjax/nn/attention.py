"""Multi-head attention with grouped queries, any position encoding, QK norm, sinks and soft-capping."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.attention.spec import PairedPages
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.mixer import SequenceMixer
from gptjax.nn.module import ParamFactory, normal, zeros
from gptjax.nn.norms import Norm
from gptjax.nn.positions import Positions
from gptjax.nn.remat import named
from gptjax.nn.values import ValueEmbedding, ValueResidual
from gptjax.types import Array, Key, UserError


@dataclasses.dataclass(frozen=True)
class Attention(SequenceMixer):
    """Base class of attention parts. `TransformerConfig` fills in fields that are None."""

    heads: int | None = None
    """N, number of query heads. None: the model's."""
    head_size: int | None = None
    """H, size of a head. None: the model's."""
    kv_heads: int | None = None
    """K, number of key/value heads, shared by groups of queries (1: multi-query). None: the model's, or N."""
    positions: Positions | None = None
    """Position encoding that rotates queries and keys. None: the model's."""
    bias: bool | None = None
    """Biases in the projections. None: as the model's linear layers."""
    window: int | None = None
    """Sliding window: number of tokens that each token attends to, itself included. None: unlimited."""
    scale: float | None = None
    """Factor of the scores; in muP, at the base head size. None: 1 / sqrt(head size)."""

    def __post_init__(self):
        for field in ("heads", "head_size", "kv_heads", "window"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"model.attention.{field}: got {value}, must be at least 1")

    def init_cross_cache(self, param: ParamFactory, encoder_output: Array) -> Any:
        """Cache entry of cross-attention to encoder_output [B, S, D], computed once per decoded text."""
        raise NotImplementedError

    def multiplier(self, head_size: int) -> float:
        """Factor of the scores for this head size."""
        return head_size**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class MultiHeadAttention(Attention):
    """o(concat_n softmax(q_n k_n^T / sqrt(H)) v_n), "Attention Is All You Need", arXiv:1706.03762, section 3.2.2.

    attention = MultiHeadAttention(heads=8, head_size=64)
    params = attention.init(key, x, positions)                   # x [B, T, D], positions int32 [B, T]
    y, _ = attention.apply(params, x, positions)                 # y [B, T, D]
    """

    reads_encoder = True

    output_bias: bool | None = None
    """Bias in the output projection. None: as `bias`."""
    qk_norm: Norm | None = None
    """Normalisation of queries and keys before the position encoding (arXiv:2302.05442). None: no normalisation."""
    joint_qk_norm: bool = False
    """Normalise all heads jointly, as in OLMo 2, instead of each head separately."""
    softcap: float | None = None
    """Bound of the scores: softcap * tanh(score / softcap), as in Gemma 2. None: no bound."""
    values: ValueEmbedding | ValueResidual | None = None
    """Addition to the values: a learned value per token, or the first layer's values. None: nothing."""
    sinks: bool = False
    """A learned attention sink per head, a score for attending to nothing, as in gpt-oss."""
    implementation: str | None = None
    """Attention kernel, a key of `kernels.attention.IMPLEMENTATIONS`. None: chosen by device, mask and options."""

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        positions: Array,
        mask: Mask = Mask(),
        cache: tuple[Array, Array] | PairedPages | None = None,
        *,
        bias: Array | None = None,
        encoder_output: Array | tuple[Array, Array] | None = None,
        tokens: Array | None = None,
        first_values: Array | None = None,
        output_scale: float = 1.0,
        dropout: float = 0.0,
        key: Key | None = None,
    ) -> tuple[Array, tuple[Array, Array] | PairedPages | None]:
        """x [B, T, D], positions int32 [B, T] -> y [B, T, D] and the new cache entry.

        mask            attention mask
        cache           (keys, values), [B, K, S, H] each, or `PairedPages`, see `SequenceMixer`
        bias            float [N, T, S] or [B, N, T, S], added to the scores
        encoder_output  cross-attention: the source [B, S, D], or its `init_cross_cache`. None: self-attention
        tokens          int32 [B, T], for value embeddings
        first_values    [B, T, K, H], values of the first layer, for value residuals. None: this is the first layer
        output_scale    factor of the initial output weights: 1/sqrt(2 L) in GPT-2, to keep a sum of L blocks small
        dropout         dropout rate of the probabilities, used if there is a `key`
        """
        rules, width = param.rules, x.shape[-1]
        N, _, H = self._sizes()
        encoding = Positions() if self.positions is None else self.positions

        q, rotate = self._project(param, "q", x), functools.partial(encoding.rotate, positions=positions)
        if encoder_output is None:
            q, k, v = rotate(q), rotate(self._project(param, "k", x)), self._project(param, "v", x)
            param.capture("values", v)
            if self.values is not None:
                v = self.values(param.scope("values"), v, x, tokens, first_values)
        else:
            if not isinstance(encoder_output, tuple):
                encoder_output = self.init_cross_cache(param, encoder_output)
            k, v = (x.swapaxes(1, 2) for x in encoder_output)
        if isinstance(cache, PairedPages):
            cache = kv.write_pairs(cache, k, v, mask)
            k, v = cast(Any, (cache, cache))  # the kernel's own layout
        elif cache is not None:
            k, v = (kv.write(old, new, mask) for old, new in zip(cache, (k, v), strict=True))
            cache, (k, v) = (k, v), (kv.read(entry, mask, q.dtype).swapaxes(1, 2) for entry in (k, v))
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
        has_output_bias = self.bias if self.output_bias is None else self.output_bias
        init = jax.nn.initializers.normal(0.02 * output_scale)
        o = param("o", (N, H, width), ("heads", None, "embed"), init, inputs=2)
        y = linear(y, o, rules("batch", "sequence", None), contract=2)
        return y + param("o_bias", (width,), (None,), zeros) if has_output_bias else y, cache

    @property
    def uses_first_values(self) -> bool:
        return isinstance(self.values, ValueResidual)

    def init_cache(
        self, batch: int, size: int, width: int, dtype: str = "float32", rules: ShardingRules = ShardingRules()
    ) -> tuple[Any, Any]:
        """Keys and values, [B, K, S, H] each: the layout in which attention reads them. A dtype of 8 bits gives
        `cache.ScaledEntry`."""
        _, K, H = self._sizes()
        sharding = rules("batch", rules.axis_if_divisible("kv_heads", K), None, None)

        def empty(width: int, dtype: str) -> Array:
            return jnp.zeros((batch, K, size, width), dtype, out_sharding=sharding)

        if dtype in kv.LARGEST:
            keys, values = (kv.ScaledEntry(empty(H, dtype), empty(1, "float32")) for _ in range(2))
        else:
            keys, values = (empty(H, dtype) for _ in range(2))
        return keys, values

    def init_pages(
        self,
        pages: int,
        size: int,
        width: int,
        dtype: str = "float32",
        rules: ShardingRules = ShardingRules(),
        *,
        biased: bool = False,
    ) -> Any:
        """On a TPU `PairedPages` if the kernel "ragged" supports them, else as `init_cache`. `implementation`, if it is
        one for pages, decides."""
        from gptjax.kernels.attention import ragged

        _, K, H = self._sizes()
        shards = rules.num_shards("heads", dict(jax.sharding.get_abstract_mesh().shape))
        reason = ragged.unsupported_pages(H, dtype, shards, biased or self.sinks)
        if self.implementation == "ragged" and reason is not None:
            raise UserError(f"attention.implementation: got 'ragged', which cannot do this: it {reason}")
        if self.implementation == "paged" or reason is not None:
            return self.init_cache(pages, size, width, dtype, rules)
        return PairedPages.empty(pages, size, K, H, dtype)

    def init_cross_cache(self, param: ParamFactory, encoder_output: Array) -> tuple[Array, Array]:
        """Keys and values, [B, K, S, H] each."""
        k, v = (self._project(param, name, encoder_output).swapaxes(1, 2) for name in ("k", "v"))
        return k, v

    def matmul_params(self, width: int, length: int) -> int:
        N, K, H = self._sizes()
        return 2 * width * H * (N + K) + 2 * N * H * min(length, self.window or length)

    def _project(self, param: ParamFactory, name: str, x: Array) -> Array:
        """x [B, T, D] -> queries "q" [B, T, N, H], or keys "k" or values "v" [B, T, K, H], normalised by `qk_norm`."""
        N, K, H = self._sizes()
        heads, axis = (N, "heads") if name == "q" else (K, param.rules.axis_if_divisible("kv_heads", K))
        w = param(name, (x.shape[-1], heads, H), ("embed", axis, None))
        saved = {"q": "queries", "k": "keys", "v": "values"}[name]
        y = named(linear(x, w, param.rules("batch", "sequence", axis, None)), saved)
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
