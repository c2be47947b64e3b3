"""Position encodings. A new one is a subclass of `Positions` and nothing else: the tests find it by themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.nn.module import Weight, normal
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Positions:
    """No encoding at all: a causal decoder can still tell positions apart by how much it sees (arXiv:2203.16634).

    The three places where an encoding can act; a subclass changes one of them. Positions are int32 [B, T], from 0.
    """

    @property
    def limit(self) -> int | None:
        """How many positions there are; None when there is no end."""
        return None

    def __call__(self, weight: Weight, x: Array, positions: Array) -> Array:
        """Add to the token embeddings [B, T, D]. A part: its parameters lie under "positions"."""
        return x

    def rotate(self, x: Array, positions: Array) -> Array:
        """Turn queries or keys [B, T, N, H] before they meet."""
        return x

    def bias(self, weight: Weight, distance: Array, heads: int, causal: bool = True) -> Array | None:
        """Add to attention scores: float32 [N, T, S], or None. distance int32 [T, S] is how many tokens the key lies
        before the query, the same in every layer. A part too: its parameters lie under "relative"."""
        return None


@dataclasses.dataclass(frozen=True)
class LearnedPositions(Positions):
    """A learned vector for each position, added to the embedding, as in GPT-2."""

    length: int
    """How many positions there are."""

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"positions.length: got {self.length}, must be at least 1")

    @property
    def limit(self) -> int:
        return self.length

    def __call__(self, weight: Weight, x: Array, positions: Array) -> Array:
        table = weight("table", (self.length, x.shape[-1]), (None, None), normal)
        return x + table.at[positions].get(out_sharding=jax.typeof(x).sharding)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Positions):
    """The encoding of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), added to the embedding:

    PE(pos, 2i) = sin(pos / theta^(2i/D)),  PE(pos, 2i+1) = cos(pos / theta^(2i/D))
    """

    theta: float = 10_000.0
    """Longest wavelength, divided by 2 pi."""

    def __call__(self, weight: Weight, x: Array, positions: Array) -> Array:
        width = x.shape[-1]
        frequency = self.theta ** (-np.arange(0, width, 2) / width)
        angle = positions[..., None] * frequency.astype(np.float32)
        waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, -1)
        return x + waves[..., :width].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RoPE(Positions):
    """Rotary encoding (Su et al. 2021, arXiv:2104.09864): a query and a key meet by their distance alone.

    The pair (x[i], x[i + H/2]) is turned by the angle pos * theta^(-2i/H): the half-split layout of Llama and GPT-NeoX.
    """

    theta: float = 10_000.0
    """Longest wavelength, divided by 2 pi. Larger for longer contexts."""

    def rotate(self, x: Array, positions: Array) -> Array:
        half = x.shape[-1] // 2
        frequency = self.theta ** (-np.arange(half) / half)
        angle = positions[..., None] * frequency.astype(np.float32)  # [B, T, H/2]
        cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
        a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
