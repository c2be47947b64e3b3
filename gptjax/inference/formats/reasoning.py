"""Marks of a model's reasoning, which comes before its answer."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """A section between two marks at the beginning of a reply."""

    open: str
    close: str

    def opened(self, prompt: str) -> bool:
        """True: the prompt ends inside of the section, as the template may open it."""
        return prompt.rfind(self.open) > prompt.rfind(self.close) and prompt.rstrip().endswith(self.open)


KINDS = (
    Reasoning("<think>", "</think>"),  # DeepSeek, Qwen, SmolLM, and most others
    Reasoning("[THINK]", "[/THINK]"),  # Mistral
    Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    Reasoning("<seed:think>", "</seed:think>"),  # ByteDance
)
