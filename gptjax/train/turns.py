"""Turns of a conversation with tools: calls that end a turn are made, and the model reads their results and goes on.

Calls are read in the model's own format, and results are written by its chat template. Only they are encoded, with what
the template puts around them; what the model wrote stays as it was drawn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

from gptjax.data import chat
from gptjax.data.chat import Conversation, ConversationTemplate, Message
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.formats import TOOLS, ReplyFormat, reply_format
from gptjax.inference.text import TextStream
from gptjax.tasks.functions import PROTOTYPE, ChatTools
from gptjax.types import UserError

MALFORMED = f"error: got a call that cannot be read, must be like {PROTOTYPE} in the form that you know"


@dataclasses.dataclass(frozen=True)
class Turns:
    """A model's calls and their results, as it knows them."""

    tools: ChatTools
    format: ReplyFormat
    tokenizer: Tokenizer
    template: ConversationTemplate | None = None
    """None: the format of `gptjax.data.chat`."""

    @classmethod
    def of(cls, tools: ChatTools, tokenizer: Any, template: ConversationTemplate | None) -> Self:
        """Turns of a model with this tokenizer and template."""
        source = None if template is None else template.source
        return cls(tools, reply_format(source, tokenizer, tools.format), tokenizer, template)

    def read(self, prompt: Sequence[int], text: str) -> Message:
        """The message of a turn of this text, which follows these tokens."""
        return self.format.message(text, True, self.format.thinking(prompt, self.tokenizer))

    def results(self, message: Message, first: int) -> tuple[Conversation, int]:
        """Results of a message's calls, if it has some, as messages; and how many of them are errors. first: number of
        calls before these."""
        calls = [call["function"] for call in message.tool_calls]
        if not calls:
            return (self._result(first, "unknown", MALFORMED),), 1
        if len(calls) > 1 and not self._several:
            return (self._result(first, calls[0]["name"], f"error: got {len(calls)} calls, must be one a turn"),), 1
        made = [self.tools.call(call["name"], call["arguments"]) for call in calls]
        found = [self._result(first + i, call["name"], made[i][0]) for i, call in enumerate(calls)]
        return tuple(found), sum(not right for _, right in made)

    @functools.cached_property
    def _several(self) -> bool:
        """True: a turn may have several calls. Llama's template takes one."""
        try:
            return bool(self.encode((self._result(0, "x", ""), self._result(1, "x", ""))))
        except UserError:
            return False

    def _result(self, number: int, name: str, text: str) -> Message:
        # Mistral's templates ask for nine letters and digits.
        return Message("tool", text, fields={"tool_call_id": f"call{number % 100_000:05d}", "name": name})

    def encode(self, results: Conversation, before: Conversation | None = None) -> list[int]:
        """Ids of results and of the beginning of the next turn. before: as in `chat.results`."""
        more = {} if before is None else {"before": before}
        if self.template is None:
            return chat.results(results, self.tokenizer, **more)
        return self.template.results(results, self.tokenizer, **more)

    def check(self, prompt: Conversation) -> None:
        """Raise UserError unless calls are read as the model's template writes them, and results are the same ids after
        this prompt, and after earlier calls, as after any other."""
        name = self.tools.functions[0].name
        call = {"id": "call00000", "type": "function", "function": {"name": name, "arguments": {"x": "y"}}}
        results = (self._result(0, name, "z"),)
        if self.encode(results, prompt) != self.encode(results):
            raise UserError("template: got one that writes results of calls otherwise after other messages")
        again = (*prompt, chat.calling(results), *results)
        if self.tools.turns > 2 and self.encode(results, again) != self.encode(results):  # as DeepSeek V3's does
            raise UserError(
                f"tools.turns: got {self.tools.turns} for a chat template that writes results of calls otherwise after "
                "earlier calls, must be at most 2"
            )
        asked = Message("user", "x"), Message("assistant", None, tool_calls=(call,))
        ids, weights = (chat.render if self.template is None else self.template.render)(asked, self.tokenizer)
        stream = TextStream(self.tokenizer, len(ids), (), None, self.format.marks)
        stream.extend(ids[weights.index(1.0) :], weights)
        read = [self.format.message(stream.text, True, thinking) for thinking in (False, True)]
        if not any(m.tool_calls and m.tool_calls[0]["function"]["name"] == name for m in read):
            raise UserError(
                "template: got one whose calls cannot be read; name their format by ChatTools(..., format=...), one of "
                f"{', '.join(TOOLS)}"
            )
