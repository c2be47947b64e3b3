"""Inference: sampling of tokens (`sampling`), generation and streaming of text (`generate`)."""

from gptjax.inference.generate import Completion
from gptjax.inference.sampling import Sampling, sample

__all__ = ["Completion", "Sampling", "sample"]
