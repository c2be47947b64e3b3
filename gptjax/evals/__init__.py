"""Evaluations: objects that take a model and return a `Result`."""

from gptjax.evals.accuracy import Accuracy
from gptjax.evals.answers import Answers
from gptjax.evals.bits_per_byte import BitsPerByte
from gptjax.evals.exact_match import ExactMatch
from gptjax.types import Result

__all__ = ["Accuracy", "Answers", "BitsPerByte", "ExactMatch", "Result"]
