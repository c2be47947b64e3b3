"""Takes a reply apart as it comes: reasoning, content and calls of tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from gptjax.inference.formats.reasoning import Reasoning
from gptjax.inference.formats.tool_format import ToolFormat


@dataclasses.dataclass(frozen=True)
class CallDelta:
    """A part of a call."""

    index: int
    """Number of the call in the reply."""
    name: str | None
    """Name of the tool, in the first part."""
    arguments: str
    """Next part of the arguments, JSON."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """Additions of a part of a reply to the message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Reader:
    """State of one reply. The deltas joined are the same however the text is divided.

    tools      format of the calls. None: all is content
    reasoning  marks of the reasoning. None: there is none
    thinking   True: the reply begins inside of the reasoning

    A block of calls that cannot be read is content, unchanged.
    """

    def __init__(self, tools: ToolFormat | None, reasoning: Reasoning | None, thinking: bool = False):
        self._tools, self._reasoning = tools, reasoning
        self._state = self._think if thinking else self._start if reasoning else self._write
        self._rest = ""  # not read yet
        self._ended = False
        self._held = ""  # white space that is content if content follows
        self._said = False
        self._block = ""  # beginning of the block
        self._json = _Value()
        self._found: list[tuple[str, str]] = []
        self.calls: list[tuple[str, str]] = []
        """Names and arguments so far."""

    def feed(self, text: str) -> Delta:
        """The next part of the reply."""
        self._rest += text
        self._found, calls = [], len(self.calls)
        arguments = len(self.calls[-1][1]) if self.calls else 0
        while self._state():
            pass
        joined = {kind: "".join(part for k, part in self._found if k == kind) for kind in ("content", "reasoning")}
        parts = []
        for i, (name, text) in enumerate(self.calls):
            if i >= calls:
                parts.append(CallDelta(i, name, text))
            elif i == calls - 1 and len(text) > arguments:
                parts.append(CallDelta(i, None, text[arguments:]))
        return Delta(**joined, calls=tuple(parts))

    def close(self) -> Delta:
        """The end of the reply."""
        self._ended = True
        return self.feed("")

    # Each state reads what it can, and returns True if another one may go on.

    def _start(self) -> bool:
        assert self._reasoning is not None
        text, mark = self._rest.lstrip(), self._reasoning.open
        if text.startswith(mark):
            return self._go(self._think, text[len(mark) :])
        if mark.startswith(text) and not self._ended:
            return False
        return self._go(self._write, self._rest)

    def _think(self) -> bool:
        assert self._reasoning is not None
        at, end = find_mark(self._rest, (self._reasoning.close,), self._ended)
        text = self._rest[:at]
        if not self._said:
            text = text.lstrip("\n")
        kept = text.rstrip("\n")
        self._found.append(("reasoning", kept))
        self._said |= bool(kept)
        if end is not None:
            self._said = False
            return self._go(self._answer, self._rest[at + len(end) :])
        self._rest = "" if self._ended else text[len(kept) :] + self._rest[at:]
        return False

    def _answer(self) -> bool:
        self._rest = self._rest.lstrip("\n")
        return self._go(self._write, self._rest) if self._rest else False

    def _write(self) -> bool:
        marks = () if self._tools is None else self._tools.begin
        if self._tools is not None and self._tools.bare and not self._said:
            if self._rest.lstrip().startswith("{"):
                self._block = ""
                return self._go(self._call, self._rest)
            if not self._rest.strip() and not self._ended:
                return False
        at, mark = find_mark(self._rest, marks, self._ended)
        self._say(self._rest[:at])
        self._rest = self._rest[at:]
        if mark is not None:
            self._block = mark
            return self._go(self._call, self._rest[len(mark) :])
        if self._ended and not self.calls:
            self._found.append(("content", self._held))
            self._held = ""
        return False

    def _call(self) -> bool:
        """At the beginning of a block."""
        assert self._tools is not None
        if self._next():
            return True
        if (found := self._end(self._tools.end)) is None:
            return False
        at, size = found
        body, end = self._rest[:at], self._rest[at : at + size]
        calls = self._tools.whole(body)
        if calls is None:
            self._say(self._block + body + end)
        else:
            self.calls += calls
            self._held = ""
        return self._go(self._write, self._rest[at + size :])

    def _arguments(self) -> bool:
        used = self._json.feed(self._rest)
        name, text = self.calls[-1]
        self.calls[-1] = name, text + self._rest[:used]
        self._rest = self._rest[used:]
        return self._go(self._tail, self._rest) if self._json.ended else False

    def _tail(self) -> bool:
        """After the arguments of a call."""
        assert self._tools is not None
        if self._next():
            return True
        if (found := self._end(self._tools.end)) is None:
            return False
        at, size = found
        self._say(self._tools.rest.sub("", self._rest[:at], count=1).strip())
        return self._go(self._write, self._rest[at + size :])

    def _end(self, mark: str | None) -> tuple[int, int] | None:
        """Place and length of a block's end; without a mark, of the text's. None: it has not come."""
        at = self._rest.find(mark) if mark is not None else -1
        if mark is not None and at >= 0:
            return at, len(mark)
        return (len(self._rest), 0) if self._ended else None

    def _next(self) -> bool:
        """Read the header of a call, if it comes next."""
        assert self._tools is not None
        found = self._tools.header.match(self._rest)
        if found is None:
            return False
        groups = found.groupdict()
        encoded, plain = groups.get("json"), groups.get("name") or groups.get("plain")
        self.calls.append((_name(encoded) if encoded is not None else (plain or "").strip(), ""))
        self._held, self._json = "", _Value()
        return self._go(self._arguments, self._rest[found.end() :])

    def _say(self, text: str) -> None:
        """Content. White space at its end is held back: it is dropped before a call."""
        kept = text.rstrip()
        if kept:
            self._found.append(("content", self._held + kept))
            self._held, self._said = "", True
        self._held += text[len(kept) :]

    def _go(self, state, rest: str) -> bool:
        self._state, self._rest = state, rest
        return True


class _Value:
    """Finds the end of a JSON object."""

    def __init__(self):
        self.ended = False
        self._depth, self._quoted, self._escaped = 0, False, False

    def feed(self, text: str) -> int:
        """Number of these characters that belong to it."""
        for i, c in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._quoted = False
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return i + 1
        return len(text)


def find_mark(text: str, marks: Sequence[str], ended: bool) -> tuple[int, str | None]:
    """Place of the first of these marks, and which it is; or the place from which one may begin, and None."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    if found:
        return min(found)
    if ended:
        return len(text), None
    kept = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return len(text) - kept, None


def _name(encoded: str) -> str:
    try:
        return json.loads(encoded)
    except ValueError:
        return encoded[1:-1]
