"""Filters of what clients send and of what models write: masks, refusals, and any object with the same two methods.

    filters = Filters(inputs=(Mask(),), outputs=(Mask(), Refuse(("secret project",))))
    make_app(models, filters=filters)

A stream goes through the same filters as the whole text, with the same result: a filter says up to where no later text
can change what it does, and only what comes after is held.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from gptjax.data.chat import Message
from gptjax.inference.engine import Generation
from gptjax.inference.engine.request import Finish
from gptjax.types import Json, UserError


class Refused(Exception):
    """A text that may not be read or written. `kept` is what comes before."""

    def __init__(self, kept: str = ""):
        super().__init__("a filter of this server refuses the text")
        self.kept = kept


class Filter(Protocol):
    """A filter of texts."""

    def border(self, text: str) -> int:
        """Number of characters after which `text` can be divided, whatever follows it: `filter(a + b)` is
        `filter(a) + filter(b)` for a = text[:border] and every b that begins with the rest."""
        ...

    def __call__(self, text: str) -> str:
        """The text as it may be read. Raises `Refused`."""
        ...


@dataclasses.dataclass(frozen=True)
class Filters:
    """Filters of a server, each applied after the one before it."""

    inputs: tuple[Filter, ...] = ()
    """Filters of messages, prompts and texts to embed. One that refuses is an error 400."""
    outputs: tuple[Filter, ...] = ()
    """Filters of replies. One that refuses ends the reply, with the reason "content_filter"."""

    def read(self, text: str) -> str:
        """A client's text as the model may read it. Raises `Refused`."""
        for one in self.inputs:
            text = one(text)
        return text

    def read_messages(self, messages: Sequence[Message]) -> list[Message]:
        """A client's conversation as the model may read it. Raises `Refused`."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        """A message with its text, its reasoning and the arguments of its calls as they may be read."""
        fields, name = message.fields, "reasoning_content"
        if name in fields:
            fields = {**fields, name: self._inside(fields[name])}
        calls = [self._inside(call, "function", "arguments") for call in message.tool_calls]
        return dataclasses.replace(
            message, content=self._inside(message.content), fields=fields, tool_calls=tuple(calls)
        )

    def _inside(self, value: Json, *path: str) -> Json:
        """The texts at this path of a JSON value, as they may be read; all there are at its end."""
        if path and isinstance(value, Mapping):
            return {name: self._inside(inner, *path[1:]) if name == path[0] else inner for name, inner in value.items()}
        if path:
            return value
        if isinstance(value, Mapping):
            return {name: self._inside(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._inside(inner) for inner in value]
        return self.read(value) if isinstance(value, str) else value

    def read_ids(self) -> None:
        """Raise `UserError` if there are filters, which token ids would pass by."""
        if self.inputs:
            raise UserError("prompt: got token ids, must be text: this server filters what it reads")


class FilterStream:
    """One text on its way through filters.

    stream = FilterStream(filters.outputs)
    shown = stream.push("my num") + stream.push("ber is ...") + stream.end()
    """

    def __init__(self, filters: Sequence[Filter]):
        self._filters = filters
        self._held = [""] * len(filters)

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown, beyond what was shown. Raises `Refused`, whose `kept` is what
        can still be shown."""
        return self._pass(text, end=False)

    def end(self) -> str:
        """The rest. Raises `Refused` likewise."""
        return self._pass("", end=True)

    def _pass(self, text: str, end: bool) -> str:
        refused = False
        for i, one in enumerate(self._filters):
            text = self._held[i] + text
            at = len(text) if end or refused else one.border(text)
            self._held[i] = text[at:]
            try:
                text = one(text[:at])
            except Refused as error:
                text, refused = error.kept, True
        if refused:
            raise Refused(text)
        return text


def attach(text: Generation, filters: Sequence[Filter], cancel: Callable[[Generation], None]) -> None:
    """Show this text only as filters let it. cancel: called if one refuses it."""
    if not filters:
        return
    stream, seen, shown, refused = FilterStream(filters), 0, "", False

    def view(whole: str, finish: Finish | None) -> tuple[str, Finish | None]:
        nonlocal seen, shown, refused
        try:
            if not refused:
                shown += stream.push(whole[seen:])
                seen = len(whole)
                if finish is not None:
                    shown += stream.end()
        except Refused as error:
            shown, refused = shown + error.kept, True
            if finish is None:
                cancel(text)
        return shown, "content_filter" if refused else finish

    text.view = view


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Refuses texts with one of these phrases, in capitals or not."""

    phrases: tuple[str, ...]

    @classmethod
    def of(cls, file: Path) -> Refuse:
        """The phrases of a file, one per line. Raises UserError."""
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"refuse: got {file}, which cannot be read: {error}") from None
        phrases = tuple(line.strip() for line in lines if line.strip())
        if not phrases:
            raise UserError(f"refuse: got {file}, which has no phrase, must have one per line")
        return cls(phrases)

    def border(self, text: str) -> int:
        """The beginning of the longest end of the text that a phrase begins with; all of it if it has a phrase."""
        folded = _fold(text)
        if self._found(folded) is None:
            longest = max(map(len, self._beginnings), default=0)
            for at in range(max(0, len(text) - longest), len(text)):
                if folded[at:] in self._beginnings:
                    return at
        return len(text)

    def __call__(self, text: str) -> str:
        """The text."""
        found = self._found(_fold(text))
        if found is not None:
            raise Refused(text[:found])
        return text

    def _found(self, folded: str) -> int | None:
        """Beginning of the phrase that ends first."""
        found = ((at + len(phrase), at) for phrase in self._folded if (at := folded.find(phrase)) >= 0)
        return min(found, default=(0, None))[1]

    @functools.cached_property
    def _folded(self) -> tuple[str, ...]:
        return tuple(map(_fold, self.phrases))

    @functools.cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(phrase[:i] for phrase in self._folded for i in range(1, len(phrase)))


def _fold(text: str) -> str:
    """The text in small letters, as long as before."""
    return text.replace("İ", "i").lower()
