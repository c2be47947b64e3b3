"""Tools and reasoning as text, for conversations in the format of `gptjax.data.chat`, which has no markers for them.
The texts are those of Hermes and Qwen: tools in the system message, reasoning and calls in the assistant's, results in
the user's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.data.chat import Message

TOOLS = """You may call these tools:
<tools>
{tools}
</tools>

For each call, write its name and its arguments as JSON:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""
CALL = '<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
THOUGHT = "<think>\n{thought}\n</think>\n\n"
RESULT = "<tool_response>\n{result}\n</tool_response>"


def tools_as_text(conversation: Iterable[Message]) -> list[Message]:
    """The conversation without tools, calls, messages of tools and reasoning; texts stand for them."""
    found: list[Message] = []
    results = False
    for message in conversation:
        calls = [_call(call) for call in message.tool_calls]
        content = "\n".join([*filter(None, [message.text]), *calls]) if calls else message.text
        if thought := message.fields.get("reasoning_content"):
            content = THOUGHT.format(thought=thought) + content
        plain, tools = dataclasses.replace(message, content=content, tools=(), tool_calls=()), message.tools
        if message.role == "tool":
            result = RESULT.format(result=message.text)
            if results:
                found[-1] = dataclasses.replace(found[-1], content=f"{found[-1].text}\n{result}")
            else:
                found.append(dataclasses.replace(plain, role="user", content=result))
            results = True
            continue
        results = False
        if tools:
            text = TOOLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
            if plain.role == "system":
                plain = dataclasses.replace(plain, content=f"{plain.text}\n\n{text}")
            else:
                found.append(dataclasses.replace(plain, role="system", content=text))
        found.append(plain)
    return found


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return CALL.format(name=json.dumps(function.get("name", "")), arguments=text)
