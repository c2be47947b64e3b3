"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptjax.data.chat import conversation
from gptjax.serve import fields as read_fields
from gptjax.serve import replies
from gptjax.serve.access import Client
from gptjax.serve.answers import reply, to_engine
from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service, body, require
from gptjax.types import UserError


async def chat(service: Service, http: HttpRequest, client: Client) -> Response:
    """A conversation's next message."""
    fields, ignored = read_fields.read(await body(http), read_fields.CHAT)
    name, served = service.choose(fields)
    require(fields, "messages")
    wants = fields.get("logprobs", False)
    if "top_logprobs" in fields and not wants:
        raise ApiError(400, 'top_logprobs: got one without "logprobs": true', "top_logprobs")

    def encode() -> tuple[int, ...]:  # templates and tokenizers take their time: not in the event loop
        roles = {"developer": "system"}
        said = [{**m, "role": roles.get(m.get("role", ""), m.get("role"))} for m in fields["messages"]]
        talk = service.policy.filters.read_messages(conversation(said, fields.get("tools")))
        if not talk:
            raise UserError("messages: got none, must be at least one")
        variables = fields.get("chat_template_kwargs")
        if fields.get("truncation") == "auto":
            talk, _ = served.model.trim(talk, fields.get("max_completion_tokens", fields.get("max_tokens")))
        return tuple(served.model.encode_chat(talk, variables))

    prompt = await asyncio.to_thread(encode)
    n = read_fields.choices(fields)
    asked = to_engine(served, fields, prompt, client)
    form = replies.Chat(name, served.model.tokenizer, wants, asked.alternatives)
    return await reply(service, http, client, served, form, [asked], n, fields, ignored)
