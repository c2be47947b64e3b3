"""Additions to attention's values: a learned vector per token, or the first layer's values."""

from __future__ import annotations

import dataclasses

import jax

from gptjax.kernels.embedding import embed
from gptjax.kernels.linear import linear
from gptjax.nn.module import ParamFactory, Part
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class ValueEmbedding(Part):
    """v_k + max_gate sigmoid(x[:gate_channels] G)_k table[token]_k for each key/value head k: a learned value per
    token, with an input-dependent gate. After value residual learning (ResFormer, arXiv:2410.17897), in the form of
    nanochat (github.com/karpathy/nanochat, nanochat/gpt.py).

    A part `values(param, v [B, T, K, H], x [B, T, D], tokens int32 [B, T]) -> [B, T, K, H]`, for
    `MultiHeadAttention(values=...)`. Costs a table [V, K, H] per layer and no matrix product.
    """

    vocab: int
    """V, number of token ids: the model's."""
    gate_channels: int = 12
    """Number of channels of x that the gate reads."""
    max_gate: float = 3.0
    """Upper bound of the gate; it is initially half of it."""

    def __call__(
        self, param: ParamFactory, v: Array, x: Array, tokens: Array | None, first_values: Array | None = None
    ) -> Array:
        if tokens is None:
            raise UserError("tokens: got none, must be given to attention that has value embeddings")
        (K, H), rules = v.shape[2:], param.rules
        heads = rules.axis_if_divisible("kv_heads", K)
        table = param("embedding", (self.vocab, K, H), (None, heads, None), kind="embedding")
        values = embed(table, tokens, rules(None, heads, None), rules("batch", "sequence", heads, None))
        # Not a hidden matrix: its inputs do not grow with the width.
        gate = param("gate", (self.gate_channels, K), (None, heads), kind="other", decays=True)
        gate = linear(x[..., : self.gate_channels], gate, rules("batch", "sequence", heads))
        return v + self.max_gate * jax.nn.sigmoid(gate)[..., None] * values


@dataclasses.dataclass(frozen=True)
class ValueResidual(Part):
    """a v + (1 - a) u, with u the first layer's values and a learned a per layer: ResFormer (Zhou et al. 2024,
    arXiv:2410.17897) in the form of modded-nanogpt (github.com/KellerJordan/modded-nanogpt), whose two weights sum to
    1. The first layer is unchanged.

    A part `values(param, v [B, T, K, H], x, tokens, first_values [B, T, K, H]) -> [B, T, K, H]`, for
    `MultiHeadAttention(values=...)`. Costs one number per layer and one more product in all, and no cache. With
    `leading_layers=(LayerOverrides(),)` every pipeline stage has the first layer. Otherwise stages send each other `v`.
    """

    init_scale: float = 0.5
    """Initial a."""

    def __call__(
        self, param: ParamFactory, v: Array, x: Array, tokens: Array | None, first_values: Array | None
    ) -> Array:
        a = param("scale", (), (), jax.nn.initializers.constant(self.init_scale))
        if first_values is None:
            return v
        if first_values.shape != v.shape:
            raise UserError(
                f"model.attention.kv_heads: got values {v.shape[2:]} in a layer, must be {first_values.shape[2:]}, "
                "as in the first"
            )
        return a * v + (1 - a) * first_values
