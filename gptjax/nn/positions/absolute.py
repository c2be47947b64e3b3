"""Absolute position encodings, added to the token embeddings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.nn.module import ParamFactory
from gptjax.nn.positions.encoding import Positions
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class LearnedPositions(Positions):
    """A learned vector for each position, x_t + P[pos_t] (Gehring et al. 2017, arXiv:1705.03122): GPT-2, BERT.

    encoding = LearnedPositions(1_024)
    params = encoding.init(key, x, positions)                               # {"params": {"table": [length, D]}}
    y = encoding.apply(params, x, positions)                                # x [B, T, D], positions int32 [B, T]
    """

    length: int
    """Number of positions."""
    offset: int = 0
    """Rows of the table before that of position 0, which nothing reads: 2 in RoBERTa."""

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"positions.length: got {self.length}, must be at least 1")
        if self.offset < 0:
            raise UserError(f"positions.offset: got {self.offset}, must be at least 0")

    @property
    def max_positions(self) -> int:
        return self.length

    def __call__(self, param: ParamFactory, x: Array, positions: Array) -> Array:
        table = param("table", (self.offset + self.length, x.shape[-1]), (None, None), kind="embedding")
        return x + table.at[positions + self.offset].get(out_sharding=jax.typeof(x).sharding)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Positions):
    """Sinusoidal encoding of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), added to the embeddings:

    PE(pos, 2i) = sin(pos / theta^(2i/D)),  PE(pos, 2i+1) = cos(pos / theta^(2i/D))
    """

    theta: float = 10_000.0
    """Longest wavelength, divided by 2 pi."""

    def __call__(self, param: ParamFactory, x: Array, positions: Array) -> Array:
        width = x.shape[-1]
        frequency = self.theta ** (-np.arange(0, width, 2) / width)
        angle = positions[..., None] * frequency.astype(np.float32)
        waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, -1)
        return x + waves[..., :width].astype(x.dtype)
