"""Using a model: drawing tokens (`sampling`), writing and streaming text (`generate`)."""

from gptjax.inference.generate import Completion
from gptjax.inference.sampling import Sampling, sample

__all__ = ["Completion", "Sampling", "sample"]
