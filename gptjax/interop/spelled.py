"""Messages whose texts spell out special tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.data.chat import Conversation, Message
from gptjax.data.tokenizers import Tokenizer
from gptjax.types import Json

JOINER = "\u2060"
"""A character without width or meaning, inserted into text that spells out a special token."""


def harmless(messages: Iterable[Message], tokenizer: Tokenizer, marks: Iterable[str]) -> Conversation:
    """Messages in which no text spells out a special token: a word joiner splits it. marks: others that neither users
    nor tools may spell out."""
    marks = tuple(marks)

    def split(value: Json, names: Iterable[str] = tuple(tokenizer.specials)) -> Any:
        if isinstance(value, str):
            for name in names:
                value = value.replace(name, name[:1] + JOINER + name[1:])
        elif isinstance(value, Mapping):
            return {split(name): split(inner) for name, inner in value.items()}
        return type(value)(map(split, value)) if isinstance(value, list | tuple) else value

    read = "content", "tool_calls", "fields", "tools"
    found = [dataclasses.replace(m, **{name: split(getattr(m, name)) for name in read}) for m in messages]
    return tuple(
        dataclasses.replace(m, content=split(m.content, marks)) if m.role in ("user", "tool") else m for m in found
    )
