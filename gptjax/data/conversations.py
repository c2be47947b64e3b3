"""Sources of conversations: tables whose rows are in one of three formats.

    OpenAIMessages   {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    ShareGPT         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    Alpaca           {"instruction": "Translate.", "input": "Hi", "output": "Hallo"}

The format is recognised from the fields of the first row, for each file, or given.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from gptjax.data.chat import Conversation, conversation
from gptjax.data.files import Where
from gptjax.data.sources import check_fraction, fingerprint
from gptjax.data.tables import FileTable, Jsonl, Table
from gptjax.protocols import Split
from gptjax.types import Json, UserError

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's "from" -> role."""


class ConversationFormat(abc.ABC):
    """Format of the rows of a table of conversations."""

    @abc.abstractmethod
    def recognises(self, row: object) -> bool:
        """True if a row has the fields of this format."""

    @abc.abstractmethod
    def conversation(self, row: Json) -> Conversation:
        """The conversation in a row. Raises UserError if it has none."""


@dataclasses.dataclass(frozen=True)
class OpenAIMessages(ConversationFormat):
    """Messages with a role and a content, in a field, or the list alone. `tools` beside them are the tools that the
    assistant may call, as a list or as JSON."""

    messages: str = "messages"
    """Field with the messages."""

    def recognises(self, row: object) -> bool:
        messages = _field(row, self.messages, default=None)
        return isinstance(messages, list) and not _is_shared(messages)

    def conversation(self, row: Json) -> Conversation:
        messages = _messages(row, self.messages, '[{"role": ..., "content": ...}, ...]')
        return conversation(messages, None if isinstance(row, list) else _json(row.get("tools"), "tools"))


@dataclasses.dataclass(frozen=True)
class ShareGPT(ConversationFormat):
    """Messages with "from" and "value". `system` and `tools` beside them are read too, and `function_call` is a call of
    a tool, as JSON with its name and arguments."""

    conversations: str = "conversations"
    """Field with the messages."""

    def recognises(self, row: object) -> bool:
        messages = _field(row, self.conversations, default=None)
        return isinstance(messages, list) and _is_shared(messages)

    def conversation(self, row: Json) -> Conversation:
        messages = _messages(row, self.conversations, '[{"from": ..., "value": ...}, ...]')
        system = _field(row, "system", default=None)
        first = [{"role": "system", "content": system}] if system else []
        return conversation(first + [_shared(item) for item in messages], _json(row.get("tools"), "tools"))


@dataclasses.dataclass(frozen=True)
class Alpaca(ConversationFormat):
    """An instruction, perhaps with an input, and the output: the user says the instruction and, on a line of its own,
    the input. `system` and `history`, pairs of earlier turns, are read too."""

    instruction: str = "instruction"
    """Field with the instruction."""
    input: str | None = "input"
    """Field with the input, which rows may lack. None: rows have none."""
    output: str = "output"
    """Field with the output."""

    def recognises(self, row: object) -> bool:
        return isinstance(row, Mapping) and {self.instruction, self.output} <= row.keys()

    def conversation(self, row: Json) -> Conversation:
        given = "" if self.input is None else _field(row, self.input, default="")
        asked = "\n".join(text for text in (_text(row, self.instruction), given) if text)
        system, history = _field(row, "system", default=None), _field(row, "history", default=None) or []
        if not isinstance(history, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in history):
            raise UserError(f"history: got {str(history)[:80]!r}, must be a list of pairs, [question, answer]")
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in [*history, [asked, _text(row, self.output)]]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return conversation(messages)


FORMATS: tuple[ConversationFormat, ...] = (
    *(OpenAIMessages(name) for name in ("messages", "conversations", "conversation")),
    *(ShareGPT(name) for name in ("conversations", "conversation", "messages")),
    Alpaca(),
)
"""Formats that are recognised."""


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations, one per row of a table. Roles are "system", "user", "assistant" and "tool"."""

    table: Table
    """Table of conversations: `Jsonl`, `Parquet`, `Csv` or `HFDataset`. (Its `text` is not read.)"""
    format: ConversationFormat | None = None
    """Format of the rows: `OpenAIMessages`, `ShareGPT` or `Alpaca`. None: recognised from the fields of the first row
    of each file, and the same for all of its rows."""

    @property
    def validation(self) -> Json:
        """As in the table. 0: there is no validation split."""
        return getattr(self.table, "validation", None)

    def documents(self, split: Split) -> Iterator[Conversation]:
        return self.table.read(split, _Reader(self.format))

    def questions(self, n: int) -> list[tuple[str, str]]:
        """Up to `n` questions of users in the validation split, each with the assistant's answer."""
        pairs = (pair for c in self.documents("validation") for pair in itertools.pairwise(c))
        asked = ((a.text, b.text) for a, b in pairs if (a.role, b.role) == ("user", "assistant") and b.text)
        return list(itertools.islice(asked, n))

    def fingerprint(self) -> str:
        return fingerprint(self, self.table.fingerprint())

    def files(self) -> Iterator[tuple[Conversations, int]]:
        """Conversations of each file, in order, and the size of the file in bytes."""
        if not isinstance(self.table, FileTable):
            return iter([(self, 0)])
        return ((dataclasses.replace(self, table=table), size) for table, size in self.table.files())


@dataclasses.dataclass(frozen=True)
class ChatJsonl:
    """Conversations in JSON lines: `Conversations(Jsonl(path))`. A line may also be a list of messages alone."""

    path: str
    """A file, a glob, or an http(s) URL. Files may be gzipped (.gz)."""
    validation: float = 0.1
    """Fraction of the conversations held out for validation, chosen by a hash of the conversation. 0: none."""
    invalid: Literal["error", "skip"] = "error"
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""
    format: ConversationFormat | None = None
    """As in `Conversations`."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[Conversation]:
        return self._whole.documents(split)

    def questions(self, n: int) -> list[tuple[str, str]]:
        """Up to `n` questions of users in the validation split, each with the assistant's answer."""
        return self._whole.questions(n)

    def fingerprint(self) -> str:
        return self._whole.fingerprint()

    def files(self) -> Iterator[tuple[Conversations, int]]:
        """Conversations of each file, in order, and the size of the file in bytes."""
        return self._whole.files()

    @property
    def _whole(self) -> Conversations:
        return Conversations(Jsonl(self.path, validation=self.validation, invalid=self.invalid), self.format)


class _Reader:
    """Conversion of rows, which keeps the format of the file that is read."""

    def __init__(self, given: ConversationFormat | None):
        self._given = given
        self._formats: dict[str, ConversationFormat] = {}

    def __call__(self, where: Where, row: Json) -> tuple[str, Conversation]:
        try:
            found = (self._given or self._recognised(where, row)).conversation(row)
        except UserError as error:
            raise UserError(f"path: {where}: {error}") from None
        return json.dumps([message.as_json() for message in found], sort_keys=True), found

    def _recognised(self, where: Where, row: Json) -> ConversationFormat:
        matching = [format for format in FORMATS if format.recognises(row)]
        if isinstance(row, list):
            matching = matching[:1]
        if len(matching) != 1:
            found = f"the fields {', '.join(row)}" if isinstance(row, Mapping) else type(row).__name__
            several = f", which are {' and '.join(map(str, matching))}" if matching else ""
            raise UserError(
                f'got {found}{several}, must be those of a conversation: "messages", "conversations", or "instruction" '
                'and "output"; name them by a format, such as format=OpenAIMessages("turns")'
            )
        (format,) = matching
        if (first := self._formats.setdefault(where.file, format)) != format:
            raise UserError(
                f"got a row of {format}, but the first row of the file is of {first}; must be one format per file"
            )
        return format


_MISSING = object()


def _field(row: Json, name: str, default: Json = _MISSING) -> Json:
    """A row's field, or the row itself if it is a list."""
    if isinstance(row, list):
        return row
    if not isinstance(row, Mapping):
        if default is _MISSING:
            raise UserError(f"got {type(row).__name__}, must be an object")
        return default
    if name not in row and default is _MISSING:
        raise UserError(f'got the fields {", ".join(row)}, must have "{name}"; name it in format')
    return row.get(name, default)


def _messages(row: Json, name: str, example: str) -> list[Any]:
    messages = _field(row, name)
    if not isinstance(messages, list) or not messages:
        raise UserError(f'got no messages, must have {example} in "{name}"')
    return messages


def _text(row: Json, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise UserError(f"{name}: got {type(value).__name__}, must be text")
    return value


def _json(value: Json, name: str) -> Json:
    """A value, or the one that a text spells in JSON."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{name}: got a text that is not JSON ({error}), must be a list of objects") from None


def _is_shared(messages: list[Any]) -> bool:
    """True if messages are ShareGPT's."""
    return any(isinstance(message, Mapping) and "from" in message for message in messages[:1])


def _shared(item: Json) -> dict[str, Any]:
    """A message of OpenAI's form."""
    if not isinstance(item, Mapping) or not {"from", "value"} <= item.keys():
        raise UserError(f"message: got {str(item)[:80]!r}, must have from and value")
    speaker, value = item["from"], item["value"]
    if speaker not in SHAREGPT_ROLES:
        raise UserError(f"from: got {speaker!r}, must be one of {', '.join(SHAREGPT_ROLES)}")
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": value}
    calls = _json(value, "function_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise UserError(f"function_call: got {str(value)[:80]!r}, must be JSON with a name and arguments")
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": c} for c in calls]}
