"""Evaluations: objects that take a model and return a `Result`.

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.evals.accuracy import Accuracy
    from gptjax.evals.answers import Answers
    from gptjax.evals.bits_per_byte import BitsPerByte
    from gptjax.evals.core import Core
    from gptjax.evals.correlation import Correlation
    from gptjax.evals.entities import Entities
    from gptjax.evals.exact_match import ExactMatch
    from gptjax.evals.exposure import Exposure
    from gptjax.evals.extracted_answers import ExtractedAnswers
    from gptjax.evals.generative import Generative
    from gptjax.evals.judge import Judge
    from gptjax.evals.multiple_choice import MultipleChoice
    from gptjax.evals.name_bias import NameBias
    from gptjax.evals.preference_accuracy import PreferenceAccuracy
    from gptjax.evals.reply_likelihood import ReplyLikelihood
    from gptjax.evals.retrieval import Retrieval
    from gptjax.evals.reward_accuracy import RewardAccuracy
    from gptjax.types import Result

__all__ = [
    "Accuracy",
    "Answers",
    "BitsPerByte",
    "Core",
    "Correlation",
    "Entities",
    "ExactMatch",
    "Exposure",
    "ExtractedAnswers",
    "Generative",
    "Judge",
    "MultipleChoice",
    "NameBias",
    "PreferenceAccuracy",
    "ReplyLikelihood",
    "Result",
    "Retrieval",
    "RewardAccuracy",
]

_NAMES = {
    "gptjax.evals.accuracy": "Accuracy",
    "gptjax.evals.answers": "Answers",
    "gptjax.evals.bits_per_byte": "BitsPerByte",
    "gptjax.evals.core": "Core",
    "gptjax.evals.correlation": "Correlation",
    "gptjax.evals.entities": "Entities",
    "gptjax.evals.exact_match": "ExactMatch",
    "gptjax.evals.exposure": "Exposure",
    "gptjax.evals.extracted_answers": "ExtractedAnswers",
    "gptjax.evals.generative": "Generative",
    "gptjax.evals.judge": "Judge",
    "gptjax.evals.multiple_choice": "MultipleChoice",
    "gptjax.evals.name_bias": "NameBias",
    "gptjax.evals.preference_accuracy": "PreferenceAccuracy",
    "gptjax.evals.reply_likelihood": "ReplyLikelihood",
    "gptjax.evals.retrieval": "Retrieval",
    "gptjax.evals.reward_accuracy": "RewardAccuracy",
    "gptjax.types": "Result",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.evals' has no attribute {name!r}")
