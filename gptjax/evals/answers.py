"""Answers of a chat model to held-out questions, beside the references, for people to read."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from gptjax.data import chat
from gptjax.protocols import Evaluation, Tokenizer
from gptjax.types import Result, UserError


class Questions(Protocol):
    """A source of questions."""

    def questions(self, n: int) -> list[tuple[str, str]]:
        """Up to n held-out questions, each with a reference answer."""
        ...


@dataclasses.dataclass(frozen=True)
class Answers(Evaluation):
    """Answers to held-out questions: `Answers(source)(language_model) -> Result`."""

    source: Questions
    """Source of the questions: `data.PyDocsChat`, `data.ChatJsonl`."""
    count: int = 8
    """Number of questions."""
    max_tokens: int = 96
    """Maximum length of an answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature. 0: greedy."""

    def check(self, tokenizer: Tokenizer) -> None:
        if not hasattr(self.source, "questions"):
            raise UserError(f"source: got {self.source}, must have questions, as PyDocsChat and ChatJsonl")
        if not (found := self.source.questions(1)):
            raise UserError(f"source: {self.source} has no question in its validation split to evaluate on")
        chat.prompt([chat.Message("user", found[0][0])], tokenizer)

    def __call__(self, model: Any) -> Result:
        lines = []
        pairs = self.source.questions(self.count)
        for question, reference in pairs:
            messages = [{"role": "user", "content": question}]
            reply = model.chat(messages, max_tokens=self.max_tokens, temperature=self.temperature)
            lines += [f"**{question}**\n", _quote(reply.content), f"\nReference: {reference}\n"]
        return Result("Held-out questions", {"questions": len(pairs)}, "\n".join(lines))


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.strip() or "(nothing)").splitlines())
