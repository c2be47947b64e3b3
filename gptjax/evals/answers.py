"""What the model answers to questions that it was not trained on, beside the reference. To read, not to score."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class Answers:
    """An evaluation: `evaluate(language_model) -> Result`."""

    source: Any
    """Has `questions(count)`: pairs of held-out question and reference answer."""
    count: int = 8
    """How many questions."""
    max_tokens: int = 96
    """Longest answer, tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""

    def __call__(self, model: Any) -> Result:
        lines = []
        pairs = self.source.questions(self.count)
        for question, reference in pairs:
            messages = [{"role": "user", "content": question}]
            reply = model.chat(messages, max_tokens=self.max_tokens, temperature=self.temperature)
            lines += [f"**{question}**\n", _quote(reply.content), f"\nThe documentation says: {reference}\n"]
        return Result("Held-out questions", {"questions": len(pairs)}, "\n".join(lines))


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.strip() or "(nothing)").splitlines())
