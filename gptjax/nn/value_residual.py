"""Value residuals: every layer's values are mixed with those of the first, which still know which token they are of."""

from __future__ import annotations

import dataclasses

import jax

from gptjax.nn.module import ParamFactory, Part
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class ValueResidual(Part):
    """a v + (1 - a) u, with u the values of the first layer before anything was mixed in, and a learned a for each
    layer: ResFormer (Zhou et al. 2024, arXiv:2410.17897) in the form of modded-nanogpt
    (github.com/KellerJordan/modded-nanogpt), whose two weights add up to 1. In the first layer it changes nothing.

    A part `values(param, v [B, T, K, H], x, tokens, first_values [B, T, K, H]) -> [B, T, K, H]`, for
    `MultiHeadAttention(values=...)`. Costs a number a layer and one more product in all, and nothing in a cache. With
    `leading_layers=(LayerOverrides(),)` every pipeline stage has the first layer; else the stages send each other `v`.
    """

    own: float = 0.5
    """a at the beginning."""

    def __call__(
        self, param: ParamFactory, v: Array, x: Array, tokens: Array | None, first_values: Array | None
    ) -> Array:
        a = param("scale", (), (), jax.nn.initializers.constant(self.own))
        if first_values is None:
            return v
        if first_values.shape != v.shape:
            raise UserError(
                f"model.attention.kv_heads: got values {v.shape[2:]} in a layer, must be {first_values.shape[2:]}, "
                "as in the first"
            )
        return a * v + (1 - a) * first_values
