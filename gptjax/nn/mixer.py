"""Sequence mixers, the parts with interaction between tokens: attention and recurrent layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from gptjax.distributed.sharding import ShardingRules
from gptjax.nn.module import Part


@dataclasses.dataclass(frozen=True)
class SequenceMixer(Part):
    """A part `mixer(param, x, positions, mask, cache, **options) -> (y, cache)`, for `Block(attention=...)`.

    x, y       [B, T, D]
    positions  int32 [B, T], positions within the document
    mask       attention mask
    cache      entry with the tokens before `mask.start`, for incremental decoding; returned with the T new ones, see
               `cache.write`. None: no cache
    options    the other arguments of `MultiHeadAttention`; a mixer ignores those that it does not use
    """

    reads_encoder: ClassVar[bool] = False
    """True if it can be cross-attention, as `MultiHeadAttention` can: it has `init_cross_cache`."""

    sequential: ClassVar[bool] = False
    """True if a token needs the output of the token before it, as in recurrent layers."""

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        """(logical axis, field, size) of axes that a mesh may shard, besides the heads and the input's."""
        return ()

    def init_cache(
        self, batch: int, size: int, width: int, dtype: str = "float32", rules: ShardingRules = ShardingRules()
    ) -> Any:
        """An empty cache entry, with a slot for each of `size` tokens of `batch` sequences: every array is
        [B, ..., S, H], see `cache.write`."""
        raise NotImplementedError

    def init_pages(
        self,
        pages: int,
        size: int,
        width: int,
        dtype: str = "float32",
        rules: ShardingRules = ShardingRules(),
        *,
        biased: bool = False,
    ) -> Any:
        """An empty cache entry of `pages` pages that sequences share, with `size` slots each, see `cache.write`.
        biased: the scores have a bias (`Positions.bias`)."""
        return self.init_cache(pages, size, width, dtype, rules)

    def matmul_params(self, width: int, length: int) -> int:
        """Multiplications per token that attends to `length` tokens: weights of matrix products, scores and sums."""
        raise NotImplementedError

    @property
    def uses_first_values(self) -> bool:
        """True if it reads the first layer's values (`first_values`)."""
        return False
