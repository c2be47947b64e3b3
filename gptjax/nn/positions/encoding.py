"""Base class of position encodings, with three methods to override."""

from __future__ import annotations

import dataclasses
from typing import Self

from gptjax.nn.module import ParamFactory, Part
from gptjax.types import Array


@dataclasses.dataclass(frozen=True)
class Positions(Part):
    """No position encoding: a causal decoder can still infer positions from the mask (arXiv:2203.16634).

    A subclass overrides one of `__call__`, `rotate` and `bias`. Positions are int32 [B, T], from 0.
    """

    @property
    def max_positions(self) -> int | None:
        """Number of positions. None: unlimited."""
        return None

    @property
    def shared(self) -> bool:
        """True if it is computed once for all layers, so that a layer cannot have another: all but those with `rotate`
        alone."""
        return type(self).__call__ is not Positions.__call__ or self.biased

    @property
    def biased(self) -> bool:
        """True if it adds to the attention scores."""
        return type(self).bias is not Positions.bias

    def for_context_length(self, length: int) -> Self:
        """This encoding for texts of up to `length` tokens."""
        return self

    def check(self, head_size: int) -> None:
        """Raise UserError if heads of this size cannot have this encoding."""

    def __call__(self, param: ParamFactory, x: Array, positions: Array) -> Array:
        """Add to the token embeddings [B, T, D]. Parameters are under "positions"."""
        return x

    def rotate(self, x: Array, positions: Array) -> Array:
        """Rotate queries or keys [B, T, N, H]."""
        return x

    def bias(self, param: ParamFactory, distance: Array, heads: int, causal: bool = True) -> Array | None:
        """Addition to attention scores: float32 [N, T, S], or None. distance int32 [T, S] is query position minus key
        position, never negative if causal where the key is visible. Parameters are under "relative", shared by all
        layers."""
        return None
