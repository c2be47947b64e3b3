"""Rewards of replies by a trained reward model: `Rollouts(task, reward=RewardModel("runs/reward"))`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

from gptjax.data.chat import Conversation
from gptjax.models import loading
from gptjax.models.identity import content_digest
from gptjax.models.regressor_model import RegressorModel
from gptjax.protocols import Reward


@dataclasses.dataclass(frozen=True)
class RewardModel(Reward):
    """A reward model, on the mesh of the policy that it rewards. It reads texts, so it may have another tokenizer."""

    collective: ClassVar[bool] = True

    path: str
    """Run, folder or repository of the hub, as `gptjax.load` takes it."""
    dtype: str | None = None
    """Compute dtype, float32 or bfloat16. None: the model's own."""
    batch: int = 32
    """Conversations per forward pass."""

    @functools.cached_property
    def model(self) -> RegressorModel:
        """The model, loaded once. Raises UserError for one of another kind."""
        return loading.load(self.path, self.dtype, kind=RegressorModel)

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        return self.model.scores(conversations, self.batch)

    def fingerprint(self) -> str:
        return content_digest(self.path)
