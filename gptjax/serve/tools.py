"""Tools that a request offers to the model: `tools`, `tool_choice`, `parallel_tool_calls`."""

from __future__ import annotations

import dataclasses
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.inference.constraints import Grammar
from gptjax.inference.formats import CallDelta, Reader, ReplyFormat
from gptjax.io.json_file import OBJECT, TEXT, check
from gptjax.serve.errors import ApiError

LIMIT = 128
"""Maximum number of tools."""
TOOL = {"type": TEXT, "function": {"name": TEXT, "description": TEXT, "parameters": OBJECT}}


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request."""

    offered: Sequence[Mapping[str, Any]]
    """As the client gave them; none if it forbids to call them."""
    callable: Mapping[str, Mapping[str, Any] | None]
    """Those that may be called, and the JSON schema of their arguments."""
    required: bool
    """True: the reply must be calls."""
    named: bool
    """True: the client has chosen the one to call."""
    parallel: bool
    """True: there may be several calls."""

    def calls(self, form: ReplyFormat, structured: bool) -> Grammar | None:
        """The grammar of calls, if the reply must be some, or may be some in place of an answer with a structure."""
        wanted = self.callable and (self.required or structured)
        return form.calls(self.callable, self.parallel) if wanted else None


def read(fields: Mapping[str, Any]) -> Tools:
    """The tools of a request. Raises `ApiError` for what is no function, and for a choice that there is not."""
    offered, choice = fields.get("tools", []), fields.get("tool_choice", "auto")
    if len(offered) > LIMIT:
        raise ApiError(400, f"tools: got {len(offered)}, must be at most {LIMIT}", "tools")
    schemas: dict[str, Mapping[str, Any] | None] = {}
    for i, tool in enumerate(offered):
        check(tool, TOOL, f"tools: {i}")
        function = tool.get("function") or {}
        name = function.get("name", "")
        if tool.get("type") != "function" or not re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", name):
            raise ApiError(400, f"tools: {i}: got no function with a name of letters, digits, _ . : and -", "tools")
        if name in schemas:
            raise ApiError(400, f"tools: got two functions named {name}", "tools")
        schemas[name] = function.get("parameters")
    named = isinstance(choice, Mapping)
    if named:
        name = (choice.get("function") or {}).get("name")
        if name not in schemas:
            raise ApiError(400, f"tool_choice: got {str(name)[:100]}, must be one of the tools", "tool_choice")
        schemas = {name: schemas[name]}
    elif choice not in ("none", "auto", "required"):
        raise ApiError(
            400, f"tool_choice: got {choice[:99]}, must be none, auto, required or a function", "tool_choice"
        )
    elif choice == "required" and not schemas:
        raise ApiError(400, "tool_choice: got required without tools", "tool_choice")
    parallel = fields.get("parallel_tool_calls", True) and not named
    if choice == "none":
        return Tools((), {}, False, False, parallel)
    return Tools(offered, schemas, named or choice == "required", named, parallel)


class Taken:
    """A reply that is taken apart as it comes, in the fields of OpenAI's interface."""

    def __init__(self, reader: Reader, named: bool, id_length: int):
        self._reader, self._named, self._length = reader, named, id_length
        self._ids: list[str] = []

    def delta(self, text: str, finish: str | None) -> dict[str, Any]:
        """Fields of a chunk's `delta` for the next part of the reply. finish: the reason for its end."""
        deltas = [self._reader.feed(text), *([self._reader.close()] if finish is not None else [])]
        content, reasoning = "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)
        calls = [self._call(part) for delta in deltas for part in delta.calls]
        return {
            **({"content": content} if content else {}),
            **({"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
        }

    def message(self, text: str) -> dict[str, Any]:
        """Fields of a `message` for the whole reply."""
        delta = self.delta(text, "stop")
        calls = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            for identity, (name, arguments) in zip(self._ids, self._reader.calls, strict=True)
        ]
        reasoning = {name: delta[name] for name in ("reasoning_content", "reasoning") if name in delta}
        content = delta.get("content") if calls else delta.get("content", "")
        return {"content": content, **reasoning, **({"tool_calls": calls} if calls else {})}

    def finish(self, finish: str | None) -> str | None:
        """The reason for the end, as OpenAI names it: calls that the client did not name take the place of "stop"."""
        return "tool_calls" if finish == "stop" and self._reader.calls and not self._named else finish

    def _call(self, part: CallDelta) -> dict[str, Any]:
        function = {"arguments": part.arguments}
        if part.name is None:
            return {"index": part.index, "function": function}
        letters = string.ascii_letters + string.digits
        self._ids.append("".join(secrets.choice(letters) for _ in range(self._length)))
        head = {"index": part.index, "id": self._ids[-1], "type": "function"}
        return {**head, "function": {"name": part.name, **function}}
