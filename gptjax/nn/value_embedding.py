"""Value embeddings: attention's values remember which token they are of, in every layer that has them."""

from __future__ import annotations

import dataclasses

import jax

from gptjax.kernels.embedding import embed
from gptjax.kernels.linear import linear
from gptjax.nn.module import ParamFactory, Part
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class ValueEmbedding(Part):
    """v_k + top sigmoid(x[:channels] G)_k table[token]_k for each key/value head k: a learned value for each token, and
    a gate that lets it in. After value residual learning (ResFormer, arXiv:2410.17897), in the form of nanochat
    (github.com/karpathy/nanochat, nanochat/gpt.py).

    A part `values(param, v [B, T, K, H], x [B, T, D], tokens int32 [B, T]) -> [B, T, K, H]`, for
    `MultiHeadAttention(values=...)`. Costs a table [V, K, H] a layer and no matrix product.
    """

    vocab: int
    """V, the number of token ids: the model's."""
    channels: int = 12
    """How many of x's channels the gate reads."""
    top: float = 3.0
    """How far the gate opens; it begins half open."""

    def __call__(
        self, param: ParamFactory, v: Array, x: Array, tokens: Array | None, first_values: Array | None = None
    ) -> Array:
        if tokens is None:
            raise UserError("tokens: got none, must be given to attention that has value embeddings")
        (K, H), rules = v.shape[2:], param.rules
        heads = rules.axis_if_divisible("kv_heads", K)
        table = param("embedding", (self.vocab, K, H), (None, heads, None), kind="embedding")
        values = embed(table, tokens, rules(None, heads, None), rules("batch", "sequence", heads, None))
        # No hidden matrix: its inputs do not grow with the width.
        opening = param("opening", (self.channels, K), (None, heads), kind="other", decays=True)
        opening = linear(x[..., : self.channels], opening, rules("batch", "sequence", heads))
        return v + self.top * jax.nn.sigmoid(opening)[..., None] * values
