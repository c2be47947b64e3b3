"""Value residuals: every layer's values are mixed with the first layer's."""

from __future__ import annotations

import dataclasses

import jax

from gptjax.nn.module import ParamFactory, Part
from gptjax.types import Array, UserError


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
