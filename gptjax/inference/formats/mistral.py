"""Calls of Mistral's models: [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}], and since their
tokenizer's version 11 [TOOL_CALLS]weather[ARGS]{"city": "Rome"}."""

from __future__ import annotations

import json
import re

from gptjax.inference.formats.tool_format import JSON_CALL, ToolFormat


class Mistral(ToolFormat):
    """A JSON list after a mark."""

    name = "mistral"
    marks = ("[TOOL_CALLS]",)
    begin = ("[TOOL_CALLS]",)
    header = re.compile(r'\s*(?:\[\s*|(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}\s*,\s*)?' + JSON_CALL)
    between = "[TOOL_CALLS][", ", ", "]"
    id_length = 9

    def around(self, name: str) -> tuple[str, str]:
        return f'{{"name": {json.dumps(name)}, "arguments": ', "}"


class MistralArguments(ToolFormat):
    """Name and arguments between marks for each call."""

    name = "mistral_args"
    marks = "[ARGS]", "[TOOL_CALLS]", "[CALL_ID]"
    begin = ("[TOOL_CALLS]",)
    header = re.compile(r"\s*(?:\[TOOL_CALLS\])?(?P<name>[^\[\]{}\s]+)(?:\[CALL_ID\][^\[\]{}]*)?\[ARGS\]\s*(?=\{)")
    id_length = 9

    def around(self, name: str) -> tuple[str, str]:
        return f"[TOOL_CALLS]{name}[ARGS]", ""
