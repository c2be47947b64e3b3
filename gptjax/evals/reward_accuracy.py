"""Accuracy of a reward model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

import numpy as np

from gptjax.data.encoding import held_out
from gptjax.data.preferences import Preference
from gptjax.evals.intervals import mean
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class RewardAccuracy(Evaluation):
    """Share of held-out pairs whose chosen reply has the higher reward; half of one with equal rewards:
    `RewardAccuracy(source)(regressor_model) -> Result`."""

    architectures: ClassVar[tuple[str, ...]] = ("regressor",)

    source: Source[Preference]
    """Source of pairs: `data.PreferencesJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of pairs, the first of the split. None: all."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, Preference)

    def __call__(self, model: Any) -> Result:
        pairs = held_out(self.source, self.split, self.documents, Preference)
        scores = model.scores([(*pair.prompt, reply) for pair in pairs for reply in (pair.chosen, pair.rejected)])
        chosen, rejected = np.array(scores).reshape(-1, 2).T
        right = ((chosen > rejected) + 0.5 * (chosen == rejected)).tolist()
        prompts = [json.dumps([message.as_json() for message in pair.prompt], sort_keys=True) for pair in pairs]
        clusters = prompts if len(set(prompts)) > 1 else [*map(str, range(len(pairs)))]  # one prompt: all differ
        interval = mean(right, clusters)
        each = enumerate(zip(clusters, right, (chosen - rejected).tolist(), strict=True))
        items = tuple({"item": i, "cluster": c, "outcome": x, "margin": margin} for i, (c, x, margin) in each)
        values = {
            "reward_accuracy": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "reward_margin": float(np.mean(chosen - rejected)),
            "pairs": len(pairs),
        }
        return Result("Reward accuracy", values, f"Chosen over rejected: **{interval:.1%}**.", items)
