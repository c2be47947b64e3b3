"""XLM-RoBERTa (arXiv:1911.02116): RoBERTa by another name, with a vocabulary for a hundred languages."""

from __future__ import annotations

import dataclasses
import functools

from gptjax.interop.families import roberta

FAMILY = dataclasses.replace(
    roberta.FAMILY,
    model_type="xlm-roberta",
    architecture="XLMRobertaForMaskedLM",
    write=functools.partial(roberta.write, stem="XLMRoberta"),
)
