"""Conversations as plain text, for models without special tokens or a chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.data.chat import Conversation, Message
from gptjax.protocols import Tokenizer
from gptjax.types import UserError

NO_TOOLS = "template: got a call of a tool, must be a template with tools: PlainText has none"


@dataclasses.dataclass(frozen=True)
class PlainText:
    """Messages one after another, each behind the prefix of its role: a `template` of `Preferences` and others.

    `PlainText()` continues a text. `PlainText("\\n\\nHuman: ", "\\n\\nAssistant: ")` writes dialogues. `bos` comes
    first if the tokenizer has one. The whole is encoded as one text."""

    user: str = ""
    """Text before each message of the user."""
    assistant: str = ""
    """Text before each message of the assistant."""
    system: str = ""
    """Text before the system's message."""
    append_eos: bool = False
    """True: `eos` ends a conversation whose last message is the assistant's, and is a target."""

    @property
    def source(self) -> str:
        """Jinja of the template: there is none."""
        return ""

    def rows(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Conversation]:
        """The conversation alone."""
        return [conversation]

    def render(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        """Token ids of a conversation and their weights as targets: those of the assistant's messages. Raises
        UserError."""
        texts, weights = [], []
        for message in conversation:
            texts += [self._prefix(message), message.text]
            weights += [0.0, message.weight if message.role == "assistant" else 0.0]
        ids = tokenizer.encode("".join(texts))
        found: list[float] = []
        for i, weight in enumerate(weights, 1):
            # A token that crosses a border belongs to the text behind it.
            end = len(ids) if i == len(texts) else _common(ids, tokenizer.encode("".join(texts[:i])))
            found += [weight] * (end - len(found))
        if self.append_eos and conversation and conversation[-1].role == "assistant":
            if tokenizer.eos is None:
                raise UserError("append_eos: got true, must be false: the tokenizer has no eos")
            ids, found = [*ids, tokenizer.eos], [*found, conversation[-1].weight]
        first = [] if tokenizer.bos is None else [tokenizer.bos]
        return [*first, *ids], [0.0] * len(first) + found

    def prompt(
        self, messages: Iterable[Message], tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's turn. Raises UserError for variables: there are none."""
        if variables:
            raise UserError(f"template: got {', '.join(variables)}, must not be given: PlainText has no variables")
        text = "".join(self._prefix(message) + message.text for message in messages) + self.assistant.rstrip()
        return [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(text)]

    def results(self, messages: Conversation, tokenizer: Tokenizer, before: Conversation = ()) -> list[int]:
        """Raises UserError: there are no calls of tools."""
        raise UserError(NO_TOOLS)

    def _prefix(self, message: Message) -> str:
        if message.role == "tool" or message.tool_calls:
            raise UserError(NO_TOOLS)
        return {"user": self.user, "assistant": self.assistant, "system": self.system}[message.role]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
