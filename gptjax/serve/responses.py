"""OpenAI's Responses interface over conversations: items in, items and typed events out."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from gptjax.inference.engine import Generation
from gptjax.io.json_file import FLAG, OBJECT, POSITIVE, TEXT, check
from gptjax.serve import fields as read_fields
from gptjax.serve import replies
from gptjax.serve.errors import ApiError
from gptjax.types import Json

FIELDS: dict[str, Any] = {
    **read_fields.SAMPLING,
    "model": TEXT,
    "input": (TEXT, [OBJECT]),
    "instructions": TEXT,
    "max_output_tokens": POSITIVE,
    "tools": [OBJECT],
    "tool_choice": (TEXT, OBJECT),
    "parallel_tool_calls": FLAG,
    "text": {"format": OBJECT},
    "truncation": TEXT,
    "stream": FLAG,
    "seed": read_fields.SEED,
    "store": FLAG,
    "previous_response_id": TEXT,
    "metadata": {"*": TEXT},
    "chat_template_kwargs": OBJECT,
}
SAME = (*read_fields.SAMPLING, "model", "parallel_tool_calls", "stream", "seed", "chat_template_kwargs")
"""Fields that a conversation has too."""
NEUTRAL: dict[str, tuple[Any, ...]] = {"background": (False,), "conversation": (), "prompt": (), "include": ([],)}
"""Fields that are not supported, with the values that mean nothing."""


def read(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields that are set, and the names of those that are unknown. Raises UserError or `ApiError`."""
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise ApiError(400, f"{name}: got {str(body[name])[:100]}, which this server does not support", name)
    return read_fields.read({name: value for name, value in body.items() if name not in NEUTRAL}, FIELDS)


def as_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the conversation's request. Raises `ApiError` for items and tools that there cannot be."""
    found: dict[str, Any] = {name: fields[name] for name in SAME if name in fields}
    system = [{"role": "system", "content": fields["instructions"]}] if "instructions" in fields else []
    found["messages"] = [*system, *_messages(items(fields["input"]))]
    if "tools" in fields:
        found["tools"] = [_tool(tool) for tool in fields["tools"]]
    choice = fields.get("tool_choice")
    if choice is not None:
        named = isinstance(choice, Mapping) and choice.get("type") == "function"
        found["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}} if named else choice
    if "max_output_tokens" in fields:
        found["max_completion_tokens"] = fields["max_output_tokens"]
    if fields.get("truncation", "disabled") != "disabled":
        found["truncation"] = fields["truncation"]
    kind = (fields.get("text") or {}).get("format")
    if kind is not None:
        schema = {name: value for name, value in kind.items() if name != "type"}
        found["response_format"] = {**kind, "json_schema": schema} if kind.get("type") == "json_schema" else kind
    return found


def items(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a request's `input`."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def with_texts(item: Mapping[str, Any], read: Callable[[str], str]) -> dict[str, Any]:
    """The item with other texts."""
    changed = dict(item)
    for name in ("content", "output", "summary"):
        value = item.get(name)
        if isinstance(value, str):
            changed[name] = read(value)
        elif isinstance(value, list):
            changed[name] = [{**part, "text": read(part.get("text") or "")} for part in value]
    return changed


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: calls belong to the assistant's message before them, reasoning to the one after it."""
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "reasoning":
            reasoning += _text(item.get("content") or item.get("summary"), i)
            continue
        if kind == "message":
            message = {"role": item.get("role"), "content": _text(item.get("content"), i)}
        elif kind == "function_call_output":
            message = {"role": "tool", "content": _text(item.get("output"), i), "tool_call_id": item.get("call_id")}
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant" and not reasoning:
                messages[-1].setdefault("tool_calls", []).append(call)
                continue
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        else:
            raise ApiError(400, f"input: {i}: got the type {str(kind)[:40]!r}, which this server cannot read", "input")
        if reasoning and message["role"] == "assistant":
            message["reasoning_content"] = reasoning
        reasoning = ""
        messages.append(message)
    return messages


def _text(content: Json, number: int) -> str:
    """The text of an item's content: a string, or parts."""
    if content is None or isinstance(content, str):
        return content or ""
    check(content, [{"type": TEXT, "text": TEXT}], f"input: {number}: content")
    kinds = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
    if other := next((part.get("type") for part in content if part.get("type") not in kinds), None):
        raise ApiError(400, f"input: {number}: got a part of the type {other[:40]!r}, must be text", "input")
    return "".join(part.get("text") or "" for part in content)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(400, f"tools: got the type {str(tool.get('type'))[:40]!r}, must be function", "tools")
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
    return {"type": "function", "function": function}


class Output:
    """Items of a reply, and the events that tell of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False

    def feed(self, delta: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Events of a chunk's `delta`."""
        events: list[dict[str, Any]] = []
        if text := delta.get("reasoning_content"):
            events += self._append("reasoning", text)
        if text := delta.get("content"):
            events += self._append("message", text)
        for call in delta.get("tool_calls", []):
            if "id" in call:
                head = {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
                events += [*self.close(), *self._begin("function_call", **head)]
            if arguments := call["function"].get("arguments"):
                self.items[-1]["arguments"] += arguments
                events.append(self._event("function_call_arguments.delta", delta=arguments))
        return events

    def close(self) -> list[dict[str, Any]]:
        """Events of the end of the item that is open, if one is."""
        if not self._open:
            return []
        self._open, item = False, self.items[-1]
        item["status"] = "completed"
        events = []
        if item["type"] == "function_call":
            arguments = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("function_call_arguments.done", **arguments))
        else:
            (part,) = item["content"]
            logprobs = {"logprobs": []} if item["type"] == "message" else {}
            events.append(self._event(f"{part['type']}.done", content_index=0, text=part["text"], **logprobs))
            events.append(self._event("content_part.done", content_index=0, part=dict(part)))
        return [*events, self._event("output_item.done", item=_copy(item))]

    def end(self) -> list[dict[str, Any]]:
        """Events of the end of the reply; one without an item has an empty message."""
        if not self.items:
            return [*self._append("message", ""), *self.close()]
        return self.close()

    def _append(self, kind: str, text: str) -> list[dict[str, Any]]:
        events = []
        if not (self._open and self.items[-1]["type"] == kind):
            name = "output_text" if kind == "message" else "reasoning_text"
            more = {"annotations": [], "logprobs": []} if kind == "message" else {}
            head = {"role": "assistant"} if kind == "message" else {"summary": []}
            events = [*self.close(), *self._begin(kind, **head, content=[])]
            part = {"type": name, "text": "", **more}
            self.items[-1]["content"].append(part)
            events.append(self._event("content_part.added", content_index=0, part=dict(part)))
        part = self.items[-1]["content"][0]
        part["text"] += text
        logprobs = {"logprobs": []} if kind == "message" else {}
        return (
            [*events, self._event(f"{part['type']}.delta", content_index=0, delta=text, **logprobs)] if text else events
        )

    def _begin(self, kind: str, **fields: Json) -> list[dict[str, Any]]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._open = True
        event = {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}
        return [event]

    def _event(self, name: str, /, **fields: Json) -> dict[str, Any]:
        head = {"type": f"response.{name}", "output_index": len(self.items) - 1}
        identity = {} if name.startswith("output_item") else {"item_id": self.items[-1]["id"]}
        return {**head, **identity, **fields}


class Responses(replies.Chat):
    """/v1/responses

    asked  the fields of the request
    keep   called with the whole response before its end is told
    """

    prefix = "resp"

    def __init__(self, asked: Mapping[str, Any], keep: Callable[[dict[str, Any]], Awaitable[None]], *arguments: Any):
        super().__init__(*arguments)
        self.id, self._asked, self._keep = self.id.replace("-", "_"), asked, keep

    async def stream(
        self, texts: Sequence[Generation], prompts: int, include_usage: bool, cancel: Callable[[Generation], None]
    ) -> AsyncIterator[str]:
        """Server-sent events, numbered; there is no [DONE]."""
        output, number, (text,) = Output(), 0, texts

        def event(fields: Mapping[str, Any]) -> str:
            nonlocal number
            data = json.dumps({**fields, "sequence_number": number}, ensure_ascii=False, allow_nan=False)
            number += 1
            return f"event: {fields['type']}\ndata: {data}\n\n"

        begun = self._response(output, "in_progress")
        yield event({"type": "response.created", "response": begun})
        yield event({"type": "response.in_progress", "response": begun})
        try:
            taken = self._new()
            async for change in replies.changes(texts):
                if change is None:
                    yield ": waiting\n\n"
                    continue
                _, piece, _, finish = change
                for fields in output.feed(taken.delta(piece, finish)):
                    yield event(fields)
                if finish is not None:
                    for fields in output.end():
                        yield event(fields)
                    response = await self._finished(output, text, finish)
                    yield event({"type": f"response.{response['status']}", "response": response})
        except ApiError as error:
            told = {"code": "server_error", "message": error.message}
            yield event({"type": "response.failed", "response": self._response(output, "failed", error=told)})
        finally:
            cancel(text)

    async def collect(self, texts: Sequence[Generation], prompts: int, n: int) -> dict[str, Any]:
        """The whole response."""
        async for _ in replies.changes(texts):
            pass
        output, (text,) = Output(), texts
        whole, _, finish = text.snapshot()
        output.feed(self._new().delta(whole, finish))
        output.end()
        return await self._finished(output, text, finish or "stop")

    async def _finished(self, output: Output, text: Generation, finish: str) -> dict[str, Any]:
        used = replies.usage([text], 1)
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
        details = {} if reason is None else {"incomplete_details": {"reason": reason}}
        response = self._response(output, "completed" if reason is None else "incomplete", usage=usage, **details)
        await self._keep(response)
        return response

    def _response(self, output: Output, status: str, **fields: Json) -> dict[str, Any]:
        shown = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **{name: self._asked.get(name) for name in shown},
            "metadata": self._asked.get("metadata", {}),
            "model": self.model,
            "output": [_copy(item) for item in output.items],
            "parallel_tool_calls": self._asked.get("parallel_tool_calls", True),
            "store": self._asked.get("store", False),
            "text": self._asked.get("text", {"format": {"type": "text"}}),
            "tool_choice": self._asked.get("tool_choice", "auto"),
            "tools": self._asked.get("tools", []),
            "truncation": self._asked.get("truncation", "disabled"),
            "usage": None,
            **fields,
        }


def _copy(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item as it is now."""
    return json.loads(json.dumps(item))
