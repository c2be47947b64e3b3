"""Tasks: items to learn from, to be evaluated on and to be rewarded for.

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.tasks.arithmetic import Gsm8k, MultiArith
    from gptjax.tasks.choice import Arc, ArcChallenge, ArcEasy, Mmlu, Piqa
    from gptjax.tasks.combine import FewShot, Mixture, Slice
    from gptjax.tasks.task import Choices, ChoiceTask, Generation, Reply, Score, Task

__all__ = [
    "Arc",
    "ArcChallenge",
    "ArcEasy",
    "ChoiceTask",
    "Choices",
    "FewShot",
    "Generation",
    "Gsm8k",
    "Mixture",
    "Mmlu",
    "MultiArith",
    "Piqa",
    "Reply",
    "Score",
    "Slice",
    "Task",
]

_NAMES = {
    "gptjax.tasks.arithmetic": "Gsm8k MultiArith",
    "gptjax.tasks.choice": "Arc ArcChallenge ArcEasy Mmlu Piqa",
    "gptjax.tasks.combine": "FewShot Mixture Slice",
    "gptjax.tasks.task": "ChoiceTask Choices Generation Reply Score Task",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.tasks' has no attribute {name!r}")
