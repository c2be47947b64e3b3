"""Chat data: conversations, and the one format in which a model reads them:

    <|bos|> <|system|> text <|end|> <|user|> text <|end|> <|assistant|> text <|end|> ...

The markers are ids that no text encodes to, so a message cannot end its own turn or begin another.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol

from gptjax.data.dataset import Dataset
from gptjax.data.encoding import DROPPED, TRUNCATED, Encode, Encoded, RowError
from gptjax.data.packing import BestFit, Packing
from gptjax.data.tokenizers import CHAT_SPECIALS
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import Tokenizer
from gptjax.types import Json, UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation. Raises `UserError` for an unknown role or for content that is not text."""

    role: str
    """"system", "user", "assistant" or "tool", whose messages are results of the assistant's calls."""
    content: str | None
    """Text. None: the assistant only calls tools."""
    tool_calls: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), kw_only=True, hash=False)
    """Calls of the assistant, as in OpenAI's API: `{"type": "function", "function": {"name": ..., "arguments": ...}}`,
    with arguments as an object, or as a text of JSON."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True, hash=False)
    """Further fields for the chat template: those of `FIELDS`."""
    tools: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), kw_only=True, hash=False)
    """Tools that the assistant may call in the conversation, as JSON schemas; on its first message."""
    weight: float = dataclasses.field(default=1.0, kw_only=True)
    """Weight of an assistant's message in the loss, from 0, not trained, to 1, as in OpenAI's files."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"role: got {self.role!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(self.weight, int | float) or not 0 <= self.weight <= 1:
            raise UserError(f"weight: got {self.weight!r}, must be a number from 0 to 1")
        if self.content is None and self.role == "assistant" and self.tool_calls:
            return
        if not isinstance(self.content, str):
            raise UserError(f"content: got {type(self.content).__name__}, must be text")
        if self.tool_calls and self.role != "assistant":
            raise UserError(f"tool_calls: got some of the role {self.role}, must be the assistant's")

    @property
    def target(self) -> bool:
        """True if the message is trained."""
        return self.role == "assistant" and self.weight > 0

    @property
    def text(self) -> str:
        """The content, or "" if there is none."""
        return self.content or ""

    def as_json(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return {"role": self.role, "content": self.content, **calls, **self.fields}


Conversation = tuple[Message, ...]
FIELDS = ("name", "tool_call_id", "reasoning_content")
"""Fields of a message that are passed to chat templates, besides role, content and tool calls. Others are ignored."""


def conversation(messages: Iterable[Message | Mapping[str, Any]], tools: Json = None) -> Conversation:
    """Convert messages, or objects with "role" and "content" as in JSON files and APIs, to a `Conversation`. Content is
    a text, or a list of parts of type "text", which are joined.

    tools  JSON schemas of the tools that the assistant may call

    Raises `UserError` if a role or content is missing, and for a part of another type, such as an image."""
    found = tuple(_message(message) for message in messages)
    if tools and found:
        found = (dataclasses.replace(found[0], tools=_objects(tools, "tools")), *found[1:])
    return found


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    calls = isinstance(message, Mapping) and message.get("tool_calls")
    if not isinstance(message, Mapping) or "role" not in message or not (calls or "content" in message):
        raise UserError(f"message: got {str(message)[:80]!r}, must have a role and a content")
    fields = {name: message[name] for name in FIELDS if message.get(name) is not None}
    if message.get("reasoning") is not None:  # another name of it, which some servers write
        fields.setdefault("reasoning_content", message["reasoning"])
    if message["role"] != "tool":
        fields.pop("name", None)  # of a person, in OpenAI's API
    content = _joined(message.get("content"))
    weight = message.get("weight")
    calls, weight = _objects(calls or (), "tool_calls"), 1.0 if weight is None else weight
    return Message(message["role"], content, tool_calls=calls, fields=fields, weight=weight)


def _joined(content: Json) -> Json:
    """Content, with the texts of its parts joined."""
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f'content: got a part of type {kind!r}, must be {{"type": "text", "text": ...}}')
    return "".join(part["text"] for part in content)


def _objects(values: Json, field: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, Mapping) for value in values):
        raise UserError(f"{field}: got {str(values)[:80]!r}, must be a list of objects")
    return tuple(values)


def render(conversation: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids and their loss weights: for the assistant's content and the "<|end|>" after it the message's, 0 for all
    else. Tools, calls, their results and reasoning are texts. Raises `UserError` for a tokenizer without the
    markers."""
    markers = _markers(tokenizer)
    ids, weights = [markers["<|bos|>"]], [0.0]
    messages = [*conversation]
    if any(m.tools or m.tool_calls or m.role == "tool" or "reasoning_content" in m.fields for m in messages):
        from gptjax.data.tool_text import tools_as_text

        messages = tools_as_text(messages)
    for message in messages:
        said = [*tokenizer.encode(message.text), markers["<|end|>"]]
        ids += [markers[f"<|{message.role}|>"], *said]
        weights += [0.0, *[message.weight * message.target] * len(said)]
    return ids, weights


def prompt(messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids up to the assistant's turn. `prompt(conversation[:-1])` is a prefix of `render(conversation)` for every
    conversation that ends with an assistant's message."""
    return [*render(messages, tokenizer)[0], _markers(tokenizer)["<|assistant|>"]]


def calling(results: Iterable[Message]) -> Message:
    """An assistant's message whose calls these are the results of, whatever their arguments were."""
    names = [(message.fields.get("tool_call_id", ""), message.fields.get("name", "")) for message in results]
    calls = [{"id": i, "type": "function", "function": {"name": name, "arguments": {}}} for i, name in names]
    return Message("assistant", None, tool_calls=tuple(calls))


def results(messages: Conversation, tokenizer: Tokenizer, before: Conversation = (Message("user", "x"),)) -> list[int]:
    """Token ids of the results of calls and of the beginning of the assistant's next turn, which follow the token that
    ended the calls. messages: of the role "tool"; before: any conversation that the calls may follow."""
    called = (*before, calling(messages))
    return prompt((*called, *messages), tokenizer)[len(render(called, tokenizer)[0]) :]


class ConversationTemplate(Protocol):
    """A model's own conversation format: `gptjax.interop.templates.ChatTemplate`."""

    @property
    def source(self) -> str:
        """Its Jinja."""
        ...

    def rows(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Conversation]:
        """Conversations to train in place of one: each begins as all of its prompts do."""
        ...

    def render(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        """Token ids and their loss weights: 1 for what the assistant writes, calls of tools included."""
        ...

    def prompt(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        """Token ids up to the assistant's turn."""
        ...

    def results(self, messages: Conversation, tokenizer: Tokenizer, before: Conversation = ...) -> list[int]:
        """Token ids of the results of calls, as in `gptjax.data.chat.results`."""
        ...


@dataclasses.dataclass(frozen=True)
class Chat(Dataset):
    """Conversations. The assistant's messages are targets, all else is context. In plain text documents every token is
    a target."""

    document_type: ClassVar[type | tuple[type, ...]] = (tuple, str)
    separator: ClassVar[str] = "\n"

    packing: Packing = BestFit()
    """Packing of conversations into sequences."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Treatment of conversations longer than a sequence: "truncate" removes the oldest turns, but no system message, so
    that every answer keeps its question, and leaves out what does not fit even so; "drop" leaves them out."""
    template: ConversationTemplate | None = None
    """Chat template of the model, which writes the conversations: `gptjax.load(path).template`. None: the format of
    `gptjax.data.chat`."""

    def encodings(self) -> tuple[Encode, ...]:
        return (ConversationEncoder(self.length, self.too_long, self.template),)

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a conversation in which the user says `text`, up to the assistant's turn."""
        messages = (Message("user", text),)
        return prompt(messages, tokenizer) if self.template is None else self.template.prompt(messages, tokenizer)

    def texts_of(self, document: Conversation | str) -> Iterable[str]:
        return (document,) if isinstance(document, str) else (message.text for message in document)


@dataclasses.dataclass(frozen=True)
class ConversationEncoder:
    """Encoding of conversations with the weights of their targets, and of texts with weight 1 everywhere."""

    length: int
    """Maximum tokens of a conversation. Longer texts stay whole."""
    too_long: Literal["truncate", "drop"]
    """As in `Chat`."""
    template: ConversationTemplate | None = None
    """As in `Chat`."""

    def __call__(self, documents: Iterator[Conversation | str], tokenizer: Tokenizer) -> Iterator[Encoded]:
        for number, document in enumerate(documents, 1):
            if isinstance(document, str):
                ids = add_bos_eos(tokenizer.encode(document), tokenizer)
                yield Encoded(ids, [1.0] * len(ids))
                continue
            try:
                rows = [document] if self.template is None else self.template.rows(document, tokenizer)
                yield from (self._encode(row, tokenizer) for row in rows)
            except UserError as error:
                raise RowError(number, str(error), "conversation") from None

    def _encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
        ids, weights = self._render(conversation, tokenizer)
        if len(ids) <= self.length:
            return Encoded(ids, weights)
        if self.too_long == "truncate" and (rest := self._truncate(conversation, tokenizer)):
            return Encoded(*self._render(rest, tokenizer), note=TRUNCATED)
        return Encoded([], note=DROPPED)

    def _render(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        return (render if self.template is None else self.template.render)(conversation, tokenizer)

    def _truncate(self, conversation: Conversation, tokenizer: Tokenizer) -> Conversation | None:
        """The system message and the newest turns that fit, from a user's on. None: no question and answer fits."""
        first = next((i for i, message in enumerate(conversation) if message.role != "system"), 0)
        starts = [i for i in range(first + 1, len(conversation)) if conversation[i].role == "user"]

        def rest(start: int) -> Conversation:
            kept = (*conversation[:first], *conversation[start:])
            return (dataclasses.replace(kept[0], tools=conversation[0].tools), *kept[1:])

        def fits(start: int) -> bool:
            return len(self._render(rest(start), tokenizer)[0]) <= self.length

        found = bisect.bisect_left(starts, True, key=fits)  # the fewer turns, the shorter
        if found == len(starts) or not any(m.role == "assistant" for m in conversation[starts[found] :]):
            return None
        return rest(starts[found])


def _markers(tokenizer: Tokenizer) -> dict[str, int]:
    if missing := [name for name in CHAT_SPECIALS if name not in tokenizer.specials]:
        raise UserError(
            f"tokenizer: got one without {' '.join(missing)}, must have the chat markers; add them by with_specials()"
        )
    return {name: tokenizer.specials[name] for name in CHAT_SPECIALS}
