"""Calls of DeepSeek's V3 and R1, with the arguments in a Markdown block, and of V3.1, without:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

import re

from gptjax.inference.formats.tool_format import ToolFormat

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeek(ToolFormat):
    """Calls between marks in a block between marks."""

    name = "deepseek"
    marks = BEGIN, END, CALL, SEPARATOR, CALL_END
    begin = (BEGIN,)
    end = END
    header = re.compile(
        rf"(?:\s*(?:```)?\s*{CALL_END})?\s*{CALL}"
        rf"(?:function{SEPARATOR}(?P<name>[^\n{{}}<]+)\n```json\n|(?P<plain>[^\n{{}}<]+){SEPARATOR})\s*(?=\{{)"
    )
    rest = re.compile(rf"\A\s*(?:```)?\s*(?:{CALL_END})?")
    between = BEGIN, "", END

    def around(self, name: str) -> tuple[str, str]:
        return f"{CALL}{name}{SEPARATOR}", CALL_END


class DeepSeekMarkdown(DeepSeek):
    """With the arguments in a Markdown block."""

    name = "deepseek_markdown"
    between = BEGIN, "\n", END

    def around(self, name: str) -> tuple[str, str]:
        return f"{CALL}function{SEPARATOR}{name}\n```json\n", f"\n```{CALL_END}"
