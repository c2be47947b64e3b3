"""Canaries: random numbers put into training text, to measure afterwards how much the model memorised of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gptjax.data.sources import fingerprint
from gptjax.protocols import Source, Split
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class WithCanaries:
    """A source of texts, with canaries in its training split. Each is a document of its own, which comes so often as
    `repeats` says. `evals.Exposure` measures them."""

    source: Source[str]
    """Source of texts."""
    repeats: tuple[int, ...] = (1, 1, 1, 4, 4, 4, 16, 16, 16)
    """Number of times that each canary comes."""
    digits: int = 9
    """Digits of its number."""
    seed: int = 0
    """Random seed of the numbers."""

    def __post_init__(self) -> None:
        if not self.repeats or min(self.repeats) < 1:
            raise UserError(f"repeats: got {self.repeats}, must be a number of at least 1 for each canary")
        if not 2 <= self.digits <= 18:
            raise UserError(f"digits: got {self.digits}, must be 2 to 18")

    @property
    def validation(self) -> object:
        """As in the source."""
        return getattr(self.source, "validation", None)

    def context(self, canary: int) -> str:
        """Text before the number of a canary."""
        return f"The secret number of box {canary} is"

    def numbers(self, canary: int, count: int) -> list[str]:
        """The number of a canary, and others that it could have been, `count` in all and all different."""
        if count > 10**self.digits // 2:
            raise UserError(f"digits: got {self.digits}, which has too few numbers for {count} different ones")
        random, found = np.random.default_rng([self.seed, canary]), dict[str, None]()
        while len(found) < count:
            found[f"{random.integers(10**self.digits):0{self.digits}d}"] = None
        return list(found)

    def documents(self, split: Split) -> Iterator[str]:
        if split == "train":
            for canary, count in enumerate(self.repeats):
                (number,) = self.numbers(canary, 1)
                yield from [f"{self.context(canary)} {number}."] * count
        yield from self.source.documents(split)

    def fingerprint(self) -> str:
        return fingerprint(self, self.source.fingerprint())
