"""Multi-head attention with grouped queries and any position encoding."""

from __future__ import annotations

import flax.linen as nn
import jax

from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.module import Module, zeros
from gptjax.nn.positions import Positions
from gptjax.types import Array


class MultiHeadAttention(Module, kw_only=True):
    """o(concat_n softmax(q_n k_n^T / sqrt(H)) v_n), "Attention Is All You Need", arXiv:1706.03762, section 3.2.2.

        layer = MultiHeadAttention(heads=8, head_size=64)
        y, _ = layer.apply(params, x, positions, Mask())          # x [B, T, D], positions int32 [B, T] -> y [B, T, D]

    For incremental decoding, pass the (keys, values) slots [B, K, S, H] of a `Cache` and get them back with the T new
    entries written at `mask.offset`. Dropout is on when the "dropout" rng is given.
    """

    heads: int
    head_size: int
    kv_heads: int | None = None
    """Key/value heads; queries share them in groups. None: as many as heads."""
    positions: Positions = Positions()
    bias: bool = False
    dropout: float = 0.0
    scale: float = 1.0
    """Multiplies the initial output weights."""

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Mask, slots: tuple[Array, Array] | None = None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        rules, width = self.rules, x.shape[-1]
        N, K, H = self.heads, self.kv_heads or self.heads, self.head_size

        def project(name: str, heads: int, axis: str) -> Array:
            w = self.weight(name, (width, heads, H), ("embed", axis, None))
            y = linear(x, w, rules("batch", "sequence", axis, None))
            return y + self.weight(f"{name}_bias", (heads, H), (axis, None), zeros) if self.bias else y

        q = self.positions.rotate(project("q", N, "heads"), positions)
        k = self.positions.rotate(project("k", K, "kv_heads"), positions)
        v = project("v", K, "kv_heads")
        if slots is not None:
            keys, values = (
                kv.write(filled, new.swapaxes(1, 2), mask.offset, axis=2)
                for filled, new in zip(slots, (k, v), strict=True)
            )
            slots = keys, values
            k, v = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        key = self.make_rng("dropout") if self.dropout and self.has_rng("dropout") else None
        y = attention(q, k, v, mask, self.dropout, key)
        o = self.weight("o", (N, H, width), ("heads", None, "embed"), jax.nn.initializers.normal(0.02 * self.scale))
        y = linear(y, o, rules("batch", "sequence", None), contract=2)
        y = y + self.weight("o_bias", (width,), (None,), zeros) if self.bias else y
        return y, slots
