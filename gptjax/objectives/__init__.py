"""Objectives: pure losses. An objective receives the model as an argument and returns weighted sums."""

from gptjax.objectives.classification import Classification
from gptjax.objectives.masked_tokens import MaskedTokens
from gptjax.objectives.multi_token import MultiToken
from gptjax.objectives.next_token import NextToken
from gptjax.objectives.sequence_to_sequence import SequenceToSequence

__all__ = ["Classification", "MaskedTokens", "MultiToken", "NextToken", "SequenceToSequence"]
