"""Chat data: conversations, and the one format in which a model reads them:

    <|bos|> <|system|> text <|end|> <|user|> text <|end|> <|assistant|> text <|end|> ...

The markers are ids that no text encodes to, so a message cannot end its own turn or begin another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from gptjax.data.dataset import Dataset, PackedSequences
from gptjax.data.packing import BestFit, Packing
from gptjax.data.store import DROPPED, TRUNCATED, Encoded, Tokens, tokenize
from gptjax.data.tokenizers import CHAT_SPECIALS
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation. Raises `UserError` for an unknown role or for content that is not text."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"role: got {self.role!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise UserError(f"content: got {type(self.content).__name__}, must be text")


Conversation = tuple[Message, ...]


def conversation(messages: Iterable[Message | Mapping[str, Any]]) -> Conversation:
    """Convert messages, or objects with "role" and "content" as in JSON files and APIs, to a `Conversation`. Raises
    `UserError` if either is missing."""
    return tuple(_message(message) for message in messages)


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise UserError(f"message: got {str(message)[:80]!r}, must have a role and a content")
    return Message(message["role"], message["content"])


def render(conversation: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids and their loss weights: 1 for the assistant's content and the "<|end|>" after it, 0 for everything
    else. Raises `UserError` for a tokenizer without the markers."""
    markers = _markers(tokenizer)
    ids, weights = [markers["<|bos|>"]], [0.0]
    for message in conversation:
        said = [*tokenizer.encode(message.content), markers["<|end|>"]]
        ids += [markers[f"<|{message.role}|>"], *said]
        weights += [0.0, *[float(message.role == "assistant")] * len(said)]
    return ids, weights


def prompt(messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids up to the assistant's turn. `prompt(conversation[:-1])` is a prefix of `render(conversation)` for every
    conversation that ends with an assistant's message."""
    return [*render(messages, tokenizer)[0], _markers(tokenizer)["<|assistant|>"]]


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

    def sequences(
        self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path
    ) -> PackedSequences:
        encode = ConversationEncoder(self.length, self.too_long)
        store = tokenize(source, tokenizer, split, cache_dir, encode, self.document_type)
        return PackedSequences(store, self.packing.plan(store.offsets, self.length))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a conversation in which the user says `text`, up to the assistant's turn."""
        return prompt((Message("user", text),), tokenizer)

    def texts_of(self, document: Conversation | str) -> Iterable[str]:
        return (document,) if isinstance(document, str) else (message.content for message in document)


@dataclasses.dataclass(frozen=True)
class ConversationEncoder:
    """Encoding of conversations with the weights of their targets, and of texts with weight 1 everywhere."""

    length: int
    """Maximum tokens of a conversation. Longer texts stay whole."""
    too_long: Literal["truncate", "drop"]
    """As in `Chat`."""

    def __call__(self, documents: Iterator[Conversation | str], tokenizer: Tokenizer) -> Iterator[Encoded]:
        for document in documents:
            if isinstance(document, str):
                ids = add_bos_eos(tokenizer.encode(document), tokenizer)
                yield Encoded(ids, [1.0] * len(ids))
                continue
            ids, weights = render(document, tokenizer)
            if len(ids) <= self.length:
                yield Encoded(ids, weights)
            elif self.too_long == "truncate" and (rest := self._truncate(document, tokenizer)):
                yield Encoded(*render(rest, tokenizer), note=TRUNCATED)
            else:
                yield Encoded([], note=DROPPED)

    def _truncate(self, conversation: Conversation, tokenizer: Tokenizer) -> Conversation | None:
        """The system message and the newest turns that fit, from a user's on. None: no question and answer fits."""
        first = next((i for i, message in enumerate(conversation) if message.role != "system"), 0)
        sizes = [2 + len(tokenizer.encode(message.content)) for message in conversation]
        room = self.length - 1 - sum(sizes[:first])
        for start in range(first + 1, len(conversation)):
            rest = conversation[start:]
            if rest[0].role == "user" and sum(sizes[start:]) <= room:
                return (*conversation[:first], *rest) if any(m.role == "assistant" for m in rest) else None
        return None


def _markers(tokenizer: Tokenizer) -> dict[str, int]:
    if missing := [name for name in CHAT_SPECIALS if name not in tokenizer.specials]:
        raise UserError(
            f"tokenizer: got one without {' '.join(missing)}, must have the chat markers; add them by with_specials()"
        )
    return {name: tokenizer.specials[name] for name in CHAT_SPECIALS}
