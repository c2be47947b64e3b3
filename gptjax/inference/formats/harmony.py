"""Replies of gpt-oss: messages in channels, each with a header.

<|channel|>analysis<|message|>Rome, then.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>
<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>
"""

from __future__ import annotations

import re

from gptjax.inference.formats.reader import Reader, find_mark
from gptjax.inference.formats.tool_format import ToolFormat

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
HEADS = START, CHANNEL, " to="
"""Beginnings of a message's header; the model may name the tool before the channel."""
TOOL = re.compile(r"to=functions\.([A-Za-z0-9_.:-]+)")


class Harmony(ToolFormat):
    """A call is a message to a tool."""

    name = "harmony"
    marks = CHANNEL, START, MESSAGE, END, "<|constrain|>"
    begin = ()
    single = True
    answer = f"{CHANNEL}final{MESSAGE}"
    thought = f"{CHANNEL}analysis{MESSAGE}", f"{END}{START}assistant"

    def around(self, name: str) -> tuple[str, str]:
        return f"{CHANNEL}commentary to=functions.{name} <|constrain|>json{MESSAGE}", ""

    def reader(self, tools: bool) -> Reader:
        return HarmonyReader(tools)


class HarmonyReader(Reader):
    """Reads messages: the channel "analysis" is reasoning, messages to tools are calls, all others are content.

    tools  False: messages to tools are content
    """

    def __init__(self, tools: bool):
        super().__init__(None, None)
        self._calls, self._state, self._kind = tools, self._header, "content"

    def _header(self) -> bool:
        """Before a message. A reply without a header is content."""
        if not self._rest:
            return False
        if not self._rest.startswith(HEADS):
            if not self._ended and any(mark.startswith(self._rest) for mark in HEADS):
                return False
            self._kind = "content"
            return self._go(self._body, self._rest)
        at = self._rest.find(MESSAGE)
        if at < 0:
            if self._ended:
                self._found.append(("content", self._rest))
                self._rest = ""
            return False
        header = self._rest[:at]
        tool = TOOL.search(header) if self._calls else None
        self._kind = "reasoning" if f"{CHANNEL}analysis" in header else "content"
        if tool is not None:
            self._kind = "call"
            self.calls.append((tool[1], ""))
        return self._go(self._body, self._rest[at + len(MESSAGE) :])

    def _body(self) -> bool:
        at, mark = find_mark(self._rest, (END, START), self._ended)
        text = self._rest[:at]
        if self._kind == "call":
            name, arguments = self.calls[-1]
            self.calls[-1] = name, arguments + text
        else:
            self._found.append((self._kind, text))
        self._rest = self._rest[at:]
        if mark is None:
            return False
        return self._go(self._header, self._rest[len(mark) if mark == END else 0 :])
