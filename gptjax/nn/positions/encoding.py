"""What a position encoding is: three places where it can act on a transformer."""

from __future__ import annotations

import dataclasses
from typing import Self

from gptjax.nn.module import ParamFactory, Part
from gptjax.types import Array


@dataclasses.dataclass(frozen=True)
class Positions(Part):
    """No encoding at all: a causal decoder can still tell positions apart by how much it sees (arXiv:2203.16634).

    A subclass changes one of the three: `__call__`, `rotate`, `bias`. Positions are int32 [B, T], from 0.
    """

    @property
    def max_positions(self) -> int | None:
        """How many positions there are; None when there is no end."""
        return None

    @property
    def shared(self) -> bool:
        """Whether it acts once for all layers, so that a layer cannot have its own: all but those that only rotate."""
        kind = type(self)
        return kind.__call__ is not Positions.__call__ or kind.bias is not Positions.bias

    def for_context_length(self, length: int) -> Self:
        """The same encoding for texts of up to so many tokens."""
        return self

    def check(self, head_size: int) -> None:
        """Raises UserError when heads of this size cannot have this encoding."""

    def __call__(self, param: ParamFactory, x: Array, positions: Array) -> Array:
        """Add to the token embeddings [B, T, D]. A part: its parameters lie under "positions"."""
        return x

    def rotate(self, x: Array, positions: Array) -> Array:
        """Turn queries or keys [B, T, N, H] before they meet."""
        return x

    def bias(self, param: ParamFactory, distance: Array, heads: int, causal: bool = True) -> Array | None:
        """Add to attention scores: float32 [N, T, S], or None. distance int32 [T, S] is how many tokens the key lies
        before the query, negative when it lies after; causal says that none does. A part too: its parameters lie under
        "relative", and all layers share them."""
        return None
