"""Chat data: conversations, and the one format in which a model reads them:

    <|bos|> <|system|> text <|end|> <|user|> text <|end|> <|assistant|> text <|end|> ...

The markers are ids that no text encodes to, so what a speaker says cannot end their turn or begin another's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from gptjax.data.dataset import Dataset, PackedRows
from gptjax.data.packing import BestFit, Packing
from gptjax.data.store import Encoded, Tokens, tokenize
from gptjax.data.tokenizers import CHAT_SPECIALS
from gptjax.data.tokenizers.tokenizer import frame
from gptjax.protocols import Source, Split, Tokenizer
from gptjax.types import UserError

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    """What one speaker says. Raises `UserError` for a role that there is not, or content that is not text."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"role: got {self.role!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise UserError(f"content: got {type(self.content).__name__}, must be text")


Conversation = tuple[Message, ...]


def conversation(messages: Iterable[Message | Mapping[str, Any]]) -> Conversation:
    """Messages, or objects with a "role" and a "content" as in JSON files and APIs, as a `Conversation`.
    Raises `UserError` for one that lacks either."""
    return tuple(_message(message) for message in messages)


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise UserError(f"message: got {str(message)[:80]!r}, must have a role and a content")
    return Message(message["role"], message["content"])


def render(conversation: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Ids and, for each, how much the loss counts it: 1 for what the assistant has to produce, its content and the
    "<|end|>" after it, and 0 for all else. Raises `UserError` for a tokenizer without the markers."""
    markers = _markers(tokenizer)
    ids, weights = [markers["<|bos|>"]], [0.0]
    for message in conversation:
        said = [*tokenizer.encode(message.content), markers["<|end|>"]]
        ids += [markers[f"<|{message.role}|>"], *said]
        weights += [0.0, *[float(message.role == "assistant")] * len(said)]
    return ids, weights


def prompt(messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant speaks: for every conversation that ends with an assistant's message,
    `prompt(conversation[:-1])` begins `render(conversation)`."""
    return [*render(messages, tokenizer)[0], _markers(tokenizer)["<|assistant|>"]]


@dataclasses.dataclass(frozen=True)
class Chat(Dataset):
    """Conversations to learn to answer in. Targets are what the assistant says; all else is context. A text beside
    them is a target from its first token to its last."""

    document_type: ClassVar[type | tuple[type, ...]] = (tuple, str)
    separator: ClassVar[str] = "\n"

    packing: Packing = BestFit()
    """How conversations are laid out in rows."""

    def rows(self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> PackedRows:
        store = tokenize(source, tokenizer, split, cache_dir, encode_conversations, self.document_type)
        return PackedRows(store, self.packing.plan(store.offsets, self.length))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids after which the model answers `text`."""
        return prompt((Message("user", text),), tokenizer)

    def texts_of(self, document: Conversation | str) -> Iterable[str]:
        return (document,) if isinstance(document, str) else (message.content for message in document)


def encode_conversations(documents: Iterator[Conversation | str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Conversations with the weights of their targets; texts, every token of which counts."""
    for document in documents:
        if isinstance(document, str):
            ids = frame(tokenizer.encode(document), tokenizer)
            yield Encoded(ids, [1.0] * len(ids))
        else:
            yield Encoded(*render(document, tokenizer))


def _markers(tokenizer: Tokenizer) -> dict[str, int]:
    if missing := [name for name in CHAT_SPECIALS if name not in tokenizer.specials]:
        raise UserError(
            f"tokenizer: got one without {' '.join(missing)}, must have the chat markers; add them by with_specials()"
        )
    return {name: tokenizer.specials[name] for name in CHAT_SPECIALS}
