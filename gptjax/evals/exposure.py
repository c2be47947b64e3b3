"""Exposure of canaries: how much of random numbers in the training text a model has memorised.

With R numbers that a canary could have been, and the rank of its own by likelihood among them,

    exposure = log2 R - log2 rank

in bits (Carlini et al. 2019, arXiv:1802.08232). The rank is estimated among `candidates` numbers drawn at random. A
model that knows nothing has 1.44 bits on average; the most is log2 of the number of candidates.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gptjax.data.canaries import WithCanaries
from gptjax.evals import intervals, likelihood
from gptjax.protocols import Evaluation, Tokenizer
from gptjax.types import Result, UserError


@dataclasses.dataclass(frozen=True)
class Exposure(Evaluation):
    """Exposure of the canaries of a source, in bits: `Exposure(source)(language_model) -> Result`."""

    source: WithCanaries
    """Source that the model was trained on."""
    candidates: int = 512
    """Numbers that are ranked for each canary, its own among them."""

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise UserError(f"candidates: got {self.candidates}, must be at least 2")

    def check(self, tokenizer: Tokenizer) -> None:
        likelihood.encode(tokenizer, self._pairs(0))

    def __call__(self, model: Any) -> Result:
        pairs = [pair for canary in range(len(self.source.repeats)) for pair in self._pairs(canary)]
        requests = likelihood.encode(model.tokenizer, pairs)
        found = [one.logprob for one in likelihood.score(model.config, model.params, requests, rules=model.rules)]
        exposures = []
        for start in range(0, len(found), self.candidates):
            own, *others = found[start : start + self.candidates]
            # Of equal ones half are counted as better, so that a model that tells none apart has no exposure.
            rank = 1 + sum(other > own for other in others) + sum(other == own for other in others) / 2
            exposures.append(math.log2(self.candidates / rank))
        values, rows = {}, []
        for count in sorted({*self.source.repeats}):
            some = [e for e, repeats in zip(exposures, self.source.repeats, strict=True) if repeats == count]
            interval = intervals.mean(some)
            values[f"exposure_bits_{count}x"] = interval.mean
            rows.append(f"| {count} | {interval:.2f} |")
        table = ["| times in the text | exposure in bits, 95 % interval |", "|---:|---|", *rows]
        most = math.log2(self.candidates)
        note = f"A model that memorised none has 1.44 bits on average, one that memorised all {most:.2f}."
        items = tuple(
            {"item": i, "cluster": str(i), "repeats": repeats, "exposure_bits": exposure}
            for i, (repeats, exposure) in enumerate(zip(self.source.repeats, exposures, strict=True))
        )
        return Result("Exposure of canaries", values, "\n".join([*table, "", note]), items)

    def _pairs(self, canary: int) -> list[tuple[str, str]]:
        numbers = self.source.numbers(canary, self.candidates)
        return [(self.source.context(canary), f" {number}") for number in numbers]
