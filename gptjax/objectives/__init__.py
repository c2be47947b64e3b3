"""Objectives: losses as pure functions. An objective takes the model as an argument and returns weighted sums.

A name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.objectives.classification import Classification
    from gptjax.objectives.contrastive import InfoNCE
    from gptjax.objectives.distillation import Distillation, OnPolicyDistillation
    from gptjax.objectives.kto import KTO
    from gptjax.objectives.masked_tokens import MaskedTokens
    from gptjax.objectives.multi_token import MultiToken
    from gptjax.objectives.next_token import NextToken
    from gptjax.objectives.policy import DAPO, GRPO, GSPO, RLOO, DrGRPO, PolicyGradient
    from gptjax.objectives.ppo import PPO
    from gptjax.objectives.preference import CPO, DPO, IPO, ORPO, SimPO
    from gptjax.objectives.regression import Regression
    from gptjax.objectives.reward import BradleyTerry
    from gptjax.objectives.sequence_to_sequence import SequenceToSequence
    from gptjax.objectives.span_extraction import SpanExtraction
    from gptjax.objectives.token_classification import TokenClassification

__all__ = [
    "CPO",
    "DAPO",
    "DPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KTO",
    "ORPO",
    "PPO",
    "RLOO",
    "BradleyTerry",
    "Classification",
    "Distillation",
    "DrGRPO",
    "InfoNCE",
    "MaskedTokens",
    "MultiToken",
    "NextToken",
    "OnPolicyDistillation",
    "PolicyGradient",
    "Regression",
    "SequenceToSequence",
    "SimPO",
    "SpanExtraction",
    "TokenClassification",
]

_HOME = {
    **dict.fromkeys(("CPO", "DPO", "IPO", "ORPO", "SimPO"), "gptjax.objectives.preference"),
    **dict.fromkeys(("DAPO", "GRPO", "GSPO", "RLOO", "DrGRPO", "PolicyGradient"), "gptjax.objectives.policy"),
    "BradleyTerry": "gptjax.objectives.reward",
    "Classification": "gptjax.objectives.classification",
    "Distillation": "gptjax.objectives.distillation",
    "KTO": "gptjax.objectives.kto",
    "OnPolicyDistillation": "gptjax.objectives.distillation",
    "InfoNCE": "gptjax.objectives.contrastive",
    "MaskedTokens": "gptjax.objectives.masked_tokens",
    "MultiToken": "gptjax.objectives.multi_token",
    "NextToken": "gptjax.objectives.next_token",
    "PPO": "gptjax.objectives.ppo",
    "Regression": "gptjax.objectives.regression",
    "SequenceToSequence": "gptjax.objectives.sequence_to_sequence",
    "SpanExtraction": "gptjax.objectives.span_extraction",
    "TokenClassification": "gptjax.objectives.token_classification",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.objectives' has no attribute {name!r}")
