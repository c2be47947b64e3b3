"""The loss of encoder-decoders: predict the next token of a target given its source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

from gptjax.objectives.next_token import NextToken
from gptjax.types import Batch, Key, Metrics, Pair, Params


@dataclasses.dataclass(frozen=True)
class SequenceToSequence(NextToken):
    """`NextToken` of the targets of a `Pair`, given its source: -log p(target | target so far, source)."""

    architectures: ClassVar[tuple[str, ...]] = ("encoder-decoder",)
    batch_type: ClassVar[type[Batch]] = Pair

    def __call__(self, apply: Callable, params: Params, batch: Any, key: Key | None = None) -> Metrics:
        """Metrics of `NextToken`. `batch` is a `Pair`; `apply` is an encoder-decoder's, which also takes source,
        source_positions and source_segments."""
        names = ("source", "source_positions", "source_segments")
        given = functools.partial(apply, **{name: getattr(batch, name) for name in names})
        return super().__call__(given, params, batch, key)
