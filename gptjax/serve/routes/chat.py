"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptjax.data.chat import conversation
from gptjax.serve import fields as read_fields
from gptjax.serve import replies, structure, tools
from gptjax.serve.access import Client
from gptjax.serve.answers import reply, to_engine
from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service, fields_of, require
from gptjax.types import UserError


async def chat(service: Service, http: HttpRequest, client: Client) -> Response:
    """A conversation's next message."""
    fields, ignored = await fields_of(http, read_fields.CHAT)
    return await answer(service, http, client, fields, ignored, replies.Chat)


async def answer(
    service: Service,
    http: HttpRequest,
    client: Client,
    fields: Mapping[str, Any],
    ignored: Sequence[str],
    form_of_reply: Callable[..., replies.Format],
) -> Response:
    """Answer a conversation. form_of_reply: called with the arguments of `replies.Chat`."""
    name, served = service.choose(fields)
    require(fields, "messages")
    wants = fields.get("logprobs", False)
    if "top_logprobs" in fields and not wants:
        raise ApiError(400, 'top_logprobs: got one without "logprobs": true', "top_logprobs")

    offered, asked_for = tools.read(fields), structure.grammar(fields)
    form = served.format
    if offered.callable and form.tools is None:
        raise ApiError(400, "tools: got some for a model of unknown format; serve it with --tool_format", "tools")

    def encode() -> tuple[int, ...]:  # templates and tokenizers take their time: not in the event loop
        said = conversation([_plain(message) for message in fields["messages"]], offered.offered)
        talk = service.policy.filters.read_messages(said)
        if not talk:
            raise UserError("messages: got none, must be at least one")
        variables = fields.get("chat_template_kwargs")
        if fields.get("truncation") == "auto":
            talk, _ = served.model.trim(talk, fields.get("max_completion_tokens", fields.get("max_tokens")))
        return tuple(served.model.encode_chat(talk, variables))

    def taken() -> tools.Taken:
        reader = form.reader(bool(offered.callable), thinking)
        return tools.Taken(reader, offered.named, 24 if form.tools is None else form.tools.id_length)

    n = read_fields.choices(fields)
    prompt, constraint = await asyncio.to_thread(encode), None
    thinking = form.thinking(prompt, served.model.tokenizer)
    answer_of, param = asked_for or (None, "tools")
    calls = offered.calls(form, answer_of is not None)
    held = form.held(None if offered.required else answer_of, calls, prompt, served.model.tokenizer)
    if held is not None:
        constraint = await structure.constraint(service.compiling, served.engine, held, param)
    asked = to_engine(served, fields, prompt, client, constraint, form.marks)
    shape = form_of_reply(name, served.model.tokenizer, wants, asked.alternatives, taken)
    return await reply(service, http, client, served, shape, [asked], n, fields, ignored)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's API as `conversation` reads it."""
    role = {"developer": "system"}.get(message.get("role", ""), message.get("role"))
    empty = {"content": ""} if role == "assistant" and message.get("content") is None else {}
    return {**message, "role": role, **empty}
