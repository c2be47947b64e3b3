"""Weights with low-rank adapters, of which each row of a batch has its own (S-LoRA, Sheng et al. 2023,
arXiv:2311.03285).

    y_b = x_b W + (x_b A_n) B_n        n = rows[b], the adapter of row b

The weight is there once. Number 0 is no adapter: its A and B are 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.kernels.linear import PackedWeight, linear
from gptjax.types import Array, Params, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight(PackedWeight):
    """A weight [*C, *O] and N adapters of it, of which row b of x uses number rows[b]."""

    base: Array | PackedWeight
    down: Array
    """[N, C, r]: A, with the input axes merged."""
    up: Array
    """[N, r, O]: B times its scale, with the output axes merged."""
    rows: Array
    """int32 [B]."""

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.shape

    def with_dtype(self, dtype: str) -> AdaptedWeight:
        base = self.base.with_dtype(dtype) if isinstance(self.base, PackedWeight) else self.base.astype(dtype)
        return dataclasses.replace(self, base=base, down=self.down.astype(dtype), up=self.up.astype(dtype))

    def linear(self, x: Array, contract: int, out_sharding: PartitionSpec | None = None) -> Array:
        if not jax.sharding.get_abstract_mesh().empty:
            raise UserError("mesh: got one, must be none: adapters per request are computed on one device")
        y = linear(x, self.base, contract=contract)
        inputs = x.reshape(len(self.rows), -1, self.down.shape[1])
        update = jnp.einsum("BTC,BCr->BTr", inputs, self.down[self.rows])
        return y + jnp.einsum("BTr,BrO->BTO", update, self.up[self.rows]).reshape(y.shape)


def with_rows(params: Params, rows: Array) -> Params:
    """Parameters for a batch whose rows use these adapters, int32 [B]."""

    def choose(w: Any) -> Any:
        return dataclasses.replace(w, rows=rows) if isinstance(w, AdaptedWeight) else w

    return jax.tree.map(choose, params, is_leaf=lambda w: isinstance(w, PackedWeight))
