"""Rotary position encoding, in both layouts, of the whole head or of a part of it."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax.numpy as jnp
import numpy as np

from gptjax.nn.positions.encoding import Positions
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Unscaled frequencies: f_i = theta^(-2i/R)."""

    def for_context_length(self, length: int) -> Self:
        """This scaling for texts of up to `length` tokens."""
        return self

    def check(self, size: int) -> None:
        """Raise UserError if R = `size` rotated numbers cannot have this scaling."""

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        """Frequencies of R = `size` rotated numbers, float64 [R/2], in radians per token."""
        return theta ** (-np.arange(0, size, 2) / size)

    @property
    def amplitude(self) -> float:
        """Factor of cosine and sine. Scores are multiplied by its square."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class RoPE(Positions):
    """Rotary encoding (Su et al. 2021, arXiv:2104.09864): scores depend on positions through their distance only.

    The first R = fraction * H numbers of a head are rotated in pairs, pair i by the angle pos * theta^(-2i/R):

        (a, b) -> (a cos - b sin, b cos + a sin)

        RoPE(theta=500_000, scaling=Llama3Scaling(factor=8)).rotate(q, positions)    # q [B, T, N, H], positions [B, T]
    """

    theta: float = 10_000.0
    """Longest wavelength, divided by 2 pi. Larger for longer contexts."""
    scaling: Scaling = Scaling()
    """Scaling of the frequencies for contexts longer than in training."""
    fraction: float = 1.0
    """Rotated fraction of a head, its first numbers: 0.25 in GPT-NeoX, 0.4 to 0.5 in Phi."""
    interleaved: bool = False
    """Pair x[2i] with x[2i+1], as in the paper, GPT-J and DeepSeek. False: x[i] with x[i + R/2], the half-split layout
    of Llama and GPT-NeoX."""
    clockwise: bool = False
    """Rotate by negative angles, as nanochat does. Scores depend on the distance alike; only parameters trained with it
    need it."""

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise UserError(f"positions.fraction: got {self.fraction}, must be more than 0 and at most 1")
        if not self.theta > 1:
            raise UserError(f"positions.theta: got {self.theta}, must be more than 1")

    def for_context_length(self, length: int) -> Self:
        return dataclasses.replace(self, scaling=self.scaling.for_context_length(length))

    def check(self, head_size: int) -> None:
        size = self._size(head_size)
        if size % 2 or not size:
            got = f"model.head_size: got {head_size}"
            if self.fraction < 1:
                got = f"positions.fraction: got {self.fraction}, which rotates {size} of {head_size} numbers"
            raise UserError(f"{got}, must be even for rotary positions, which rotate pairs")
        self.scaling.check(size)

    def rotate(self, x: Array, positions: Array) -> Array:
        size = self._size(x.shape[-1])
        frequency = self.scaling.frequencies(self.theta, size) * (-1 if self.clockwise else 1)
        angle = positions[..., None] * frequency.astype(np.float32)  # [B, T, R/2]
        cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
        if self.scaling.amplitude != 1:
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude
        turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
        if self.interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
        else:
            a, b = turned[..., : size // 2], turned[..., size // 2 :]
        pair = a * cos - b * sin, b * cos + a * sin
        turned = jnp.stack(pair, -1).reshape(turned.shape) if self.interleaved else jnp.concatenate(pair, -1)
        return jnp.concatenate([turned.astype(x.dtype), rest], -1) if size < x.shape[-1] else turned.astype(x.dtype)

    def _size(self, head_size: int) -> int:
        """R, number of rotated numbers of a head."""
        return int(head_size * self.fraction)
