"""Sequence mixers: the parts that let tokens see one another. Attention is one, a recurrent layer another."""

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
    mask       `Mask`: the tokens that each token sees
    cache      for incremental decoding: an entry in which the tokens before `mask.start` are; it comes back with T
               more. None: no cache
    options    what else a block offers, see `MultiHeadAttention`; a mixer ignores what it has no use for
    """

    reads_encoder: ClassVar[bool] = False
    """Whether it can be cross-attention: it has `init_cross_cache`, as `MultiHeadAttention` does."""

    def init_cache(
        self, batch: int, size: int, width: int, dtype: str = "float32", rules: ShardingRules = ShardingRules()
    ) -> Any:
        """An empty cache entry for `size` tokens of `batch` sequences; every array is [B, ...]."""
        raise NotImplementedError

    def matmul_params(self, width: int, length: int) -> int:
        """Multiplications per token that sees `length` others: weights of matrix products, scores and sums."""
        raise NotImplementedError

    @property
    def uses_first_values(self) -> bool:
        """Whether it mixes in the values of the first layer (`first_values`)."""
        return False
