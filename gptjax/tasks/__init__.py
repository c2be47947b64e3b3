"""Tasks: items to learn from, to be evaluated on and to be rewarded for.

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.tasks.arithmetic import Gsm8k, MultiArith
    from gptjax.tasks.choice import Arc, ArcChallenge, ArcEasy, Mmlu, Piqa
    from gptjax.tasks.code import HumanEval
    from gptjax.tasks.combine import FewShot, HeldOut, Mixture, Slice
    from gptjax.tasks.conversations import TaskConversations, TaskPairs
    from gptjax.tasks.functions import Calculate, ChatTools, Function, Functions, RunPython
    from gptjax.tasks.gym import ReasoningGym
    from gptjax.tasks.letters import CountLetters, Spelling
    from gptjax.tasks.memorised import Memorised
    from gptjax.tasks.overlap import Summaries, Summarise, Translate, Translations
    from gptjax.tasks.polarity import SentencePolarity
    from gptjax.tasks.safety import Jailbreak, OverRefusal, Refusal
    from gptjax.tasks.squad import OtherPassage, Reading, Squad
    from gptjax.tasks.task import Choices, ChoiceTask, Generation, Reply, Score, Task
    from gptjax.tasks.tools import Calculator, Python, Tool

__all__ = [
    "Arc",
    "ArcChallenge",
    "ArcEasy",
    "Calculate",
    "Calculator",
    "ChatTools",
    "ChoiceTask",
    "Choices",
    "CountLetters",
    "FewShot",
    "Function",
    "Functions",
    "Generation",
    "Gsm8k",
    "HeldOut",
    "HumanEval",
    "Jailbreak",
    "Memorised",
    "Mixture",
    "Mmlu",
    "MultiArith",
    "OtherPassage",
    "OverRefusal",
    "Piqa",
    "Python",
    "Reading",
    "ReasoningGym",
    "Refusal",
    "Reply",
    "RunPython",
    "Score",
    "SentencePolarity",
    "Slice",
    "Spelling",
    "Squad",
    "Summaries",
    "Summarise",
    "Task",
    "TaskConversations",
    "TaskPairs",
    "Tool",
    "Translate",
    "Translations",
]

_NAMES = {
    "gptjax.tasks.arithmetic": "Gsm8k MultiArith",
    "gptjax.tasks.choice": "Arc ArcChallenge ArcEasy Mmlu Piqa",
    "gptjax.tasks.code": "HumanEval",
    "gptjax.tasks.combine": "FewShot HeldOut Mixture Slice",
    "gptjax.tasks.conversations": "TaskConversations TaskPairs",
    "gptjax.tasks.functions": "Calculate ChatTools Function Functions RunPython",
    "gptjax.tasks.gym": "ReasoningGym",
    "gptjax.tasks.letters": "CountLetters Spelling",
    "gptjax.tasks.memorised": "Memorised",
    "gptjax.tasks.overlap": "Summaries Summarise Translate Translations",
    "gptjax.tasks.polarity": "SentencePolarity",
    "gptjax.tasks.safety": "Jailbreak OverRefusal Refusal",
    "gptjax.tasks.squad": "OtherPassage Reading Squad",
    "gptjax.tasks.task": "ChoiceTask Choices Generation Reply Score Task",
    "gptjax.tasks.tools": "Calculator Python Tool",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.tasks' has no attribute {name!r}")
