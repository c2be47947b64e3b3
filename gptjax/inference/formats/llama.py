"""Calls of Llama 3.1, 3.2 and 3.3, which may come after <|python_tag|>:

{"name": "weather", "parameters": {"city": "Rome"}}; {"name": ...}
"""

from __future__ import annotations

import json
import re

from gptjax.inference.formats.tool_format import JSON_CALL, ToolFormat


class Llama(ToolFormat):
    """JSON objects that are the whole reply."""

    name = "llama"
    marks = ("<|python_tag|>",)
    begin = ("<|python_tag|>",)
    bare = True
    header = re.compile(r"\s*(?:\}\s*;\s*)?" + JSON_CALL)
    between = "", "; ", ""

    def around(self, name: str) -> tuple[str, str]:
        return f'{{"name": {json.dumps(name)}, "parameters": ', "}"
