"""The interface of a format of calls."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from gptjax.types import Json

NAME = r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)?"name"\s*:\s*(?P<json>"(?:[^"\\]|\\.)*")\s*,\s*'
JSON_CALL = NAME + r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
"""Beginning of a call as a JSON object, up to its arguments. The group `json` is the name as JSON; in formats that
write it plainly the group is called `name`."""


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """The way calls are written. A block of calls begins at one of `begin` and ends with `end`; in it, each call begins
    with `header`, matched where the last one ended, up to its arguments, which are JSON."""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]] = ()
    """Marks that may be special tokens. The first tells a template of this format from others."""
    begin: ClassVar[tuple[str, ...]]
    """Beginnings of a block."""
    bare: ClassVar[bool] = False
    """True: a reply that begins with a brace is a block, too."""
    end: ClassVar[str | None] = None
    """End of a block. None: that of the reply."""
    header: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    """Beginning of a call, up to its arguments."""
    rest: ClassVar[re.Pattern[str]] = re.compile(r"\A[\s}\];]*")
    """Text between the arguments of the last call and the end of the block. What else is there is content."""
    between: ClassVar[tuple[str, str, str]] = ("", "", "")
    """Texts before the first call, between two, and after the last, as a model writes them."""
    single: ClassVar[bool] = False
    """True: a reply has one call."""
    answer: ClassVar[str] = ""
    """Text before an answer that calls no tool."""
    thought: ClassVar[tuple[str, str] | None] = None
    """Marks of the reasoning, if they belong to the format. None: those of `Reasoning`."""
    id_length: ClassVar[int] = 24
    """Number of letters and digits of a call's identity."""

    def around(self, name: str) -> tuple[str, str]:
        """Texts before and after the arguments of a call of this tool, as a model writes them."""
        raise NotImplementedError

    def whole(self, body: str) -> list[tuple[str, str]] | None:
        """Calls, names with arguments, in a block that `header` does not match. None: it is no call."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        calls = [_call(one, self.bare) for one in (value if isinstance(value, list) else [value])]
        return [call for call in calls if call is not None] if calls and None not in calls else None

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, names with arguments as JSON, as a model writes them."""
        first, middle, last = self.between
        return first + middle.join(arguments.join(self.around(name)) for name, arguments in calls) + last


def _call(value: Json, strict: bool) -> tuple[str, str] | None:
    """Name and arguments of a call as a JSON value, whatever the order of its fields. strict: there must be some."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:
        if strict:
            return None
        arguments = {}
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
