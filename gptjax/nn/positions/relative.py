"""Relative position biases, added to attention scores."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from gptjax.nn.module import ParamFactory
from gptjax.nn.positions.encoding import Positions
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class ALiBi(Positions):
    """Attention with linear biases (Press et al. 2021, arXiv:2108.12409): score_nts - slope_n |t - s|.

    bias = ALiBi().apply({}, Mask().distance(T, S), heads, method="bias")    # float32 [N, T, S]
    """

    def bias(self, param: ParamFactory, distance: Array, heads: int, causal: bool = True) -> Array:
        slope = jnp.asarray(slopes(heads), jnp.float32)[:, None, None]
        slope = jnp.broadcast_to(slope, slope.shape, out_sharding=param.rules("heads", None, None))
        return -slope * jnp.abs(distance).astype(jnp.float32)


def slopes(heads: int) -> np.ndarray:
    """Slopes, float64 [N]: 2^(-8n/N) for n = 1 .. N if N is a power of 2. Otherwise those of the next lower power of 2,
    then every other one of the next higher power, as in the authors' code."""
    power = 2 ** int(math.log2(heads))
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([first, between[: heads - power]])


@dataclasses.dataclass(frozen=True)
class T5Bias(Positions):
    """Relative bias of T5 (Raffel et al. 2019, arXiv:1910.10683, section 2.1): score_nts + table[bucket(t - s), n].

    A learned number per head and bucket of distances, shared by all layers. (T5 also has unscaled scores:
    `MultiHeadAttention(scale=1.0)`.)

    encoding, distance = T5Bias(), Mask().distance(T, S) params = encoding.init(key, distance, heads, method="bias")
    # {"params": {"table": [buckets, N]}} bias = encoding.apply(params, distance, heads, method="bias")           #
    float32 [N, T, S]
    """

    buckets: int = 32
    """Number of buckets, both directions together."""
    max_distance: int = 128
    """Distances from this one on are in the last bucket."""

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 2:
            raise UserError(f"positions.buckets: got {self.buckets}, must be even and at least 4")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"positions.max_distance: got {self.max_distance}, must be more than half of the {self.buckets} buckets"
            )

    def bias(self, param: ParamFactory, distance: Array, heads: int, causal: bool = True) -> Array:
        table = param("table", (self.buckets, heads), (None, "heads"), kind="other", decays=True)
        table = table.astype(jnp.float32).T
        sharding = param.rules("heads", None)
        # First a number per distance, then one per query and key: the gradient does not sum whole matrices into a few
        # buckets, and the logarithm is numpy's on every device.
        nearest, furthest = 0 if causal else -self.max_distance, self.max_distance
        near = table.at[:, self.bucket(np.arange(nearest, furthest + 1), causal)].get(out_sharding=sharding)
        sharding = param.rules("heads", None, None)
        return near.at[:, jnp.clip(distance, nearest, furthest) - nearest].get(out_sharding=sharding)

    def bucket(self, distance: np.ndarray, causal: bool = True) -> np.ndarray:
        """Distance, query position minus key position -> bucket in [0, buckets).

        Half of the buckets are for one distance each, from 0; the others grow logarithmically. A causal model uses all
        for keys before the query, others the upper half for keys after it.
        """
        buckets, after = self.buckets, 0
        if not causal:
            buckets //= 2
            after = np.where(distance < 0, buckets, 0)
        distance = np.maximum(distance, 0) if causal else np.abs(distance)
        exact = buckets // 2
        share = np.log(np.maximum(distance, exact) / exact) / math.log(self.max_distance / exact)
        coarse = np.minimum(exact + (share * (buckets - exact)).astype(int), buckets - 1)
        return after + np.where(distance < exact, distance, coarse)
