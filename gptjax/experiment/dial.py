"""One dial of complexity: sizes, tokens, batch and rates of a model as functions of its depth.

    BASE = Dial(depth=4, width=256, heads=2, steps=400, batch=8, learning_rate=5e-3, weight_decay=0.0)

    def at_depth(depth: int) -> Experiment:
        dial = BASE.at(depth, vocab=4_096)
        ...

An experiment file with a function `at_depth` has the option `--depth`, and `--sweep depth=2,4,6,8` trains a series for
`gptjax scaling`. The rules are those of nanochat (github.com/karpathy/nanochat):

    width           64 per layer at the base's ratio; heads of the base's size
    parameters      P = 12 depth width^2 + vocab width, of the blocks and the head
    tokens          in proportion to P: the base's tokens per parameter (Hoffmann et al. 2022, arXiv:2203.15556)
    batch           in proportion to tokens^0.383 (Bergsma et al. 2025, arXiv:2505.13738), rounded to a power of two
    learning rate   in proportion to sqrt(batch)
    weight decay    in proportion to sqrt(batch) / tokens: a constant time scale of the average of updates, in epochs
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

from gptjax.types import UserError

BATCH_EXPONENT = 0.383


@dataclasses.dataclass(frozen=True)
class Dial:
    """Numbers of a model and its training that were tuned at one depth, and follow from it at others."""

    depth: int
    """Number of layers."""
    width: int
    heads: int
    steps: int
    batch: int
    """Sequences per step."""
    learning_rate: float
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.depth < 1:
            raise UserError(f"depth: got {self.depth}, must be at least 1")

    def parameters(self, vocab: int) -> int:
        """Number of parameters of the blocks and of the head, about."""
        return 12 * self.depth * self.width**2 + vocab * self.width

    def at(self, depth: int, vocab: int) -> Self:
        """The numbers at another depth. Raises UserError if the width is no whole number of heads."""
        head = self.width // self.heads
        width = -(-self.width * depth // (self.depth * head)) * head  # rounded up to whole heads
        sized = dataclasses.replace(self, depth=depth, width=width, heads=width // head)
        more = sized.parameters(vocab) / self.parameters(vocab)
        batch = 2 ** max(round(math.log2(self.batch * more**BATCH_EXPONENT)), 0) if depth != self.depth else self.batch
        larger = batch / self.batch
        return dataclasses.replace(
            sized,
            batch=batch,
            steps=max(round(self.steps * more / larger), 1),
            learning_rate=self.learning_rate * math.sqrt(larger),
            weight_decay=self.weight_decay * math.sqrt(larger) / more,
        )
