"""Calls of Hermes 2 and 3, Qwen 2.5 and 3, and of models that were trained here without a template of their own:

<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

from __future__ import annotations

import json
import re

from gptjax.inference.formats.tool_format import JSON_CALL, ToolFormat


class Hermes(ToolFormat):
    """One JSON object between marks for each call."""

    name = "hermes"
    marks = "<tool_call>", "</tool_call>"
    begin = ("<tool_call>",)
    end = "</tool_call>"
    header = re.compile(r"\s*" + JSON_CALL)
    between = "", "\n", ""

    def around(self, name: str) -> tuple[str, str]:
        return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ', "}\n</tool_call>"
