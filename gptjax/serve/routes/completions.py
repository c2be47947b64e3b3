"""POST /v1/completions"""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptjax.serve import fields as read_fields
from gptjax.serve import replies, structure
from gptjax.serve.access import Client
from gptjax.serve.answers import reply, to_engine
from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service, fields_of, require


async def complete(service: Service, http: HttpRequest, client: Client) -> Response:
    """Texts to continue."""
    fields, ignored = await fields_of(http, read_fields.COMPLETION)
    name, served = service.choose(fields)
    require(fields, "prompt")

    asked_for = structure.grammar(fields)

    def encode() -> list[tuple[int, ...]]:
        given = fields["prompt"]
        given = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        filters = service.policy.filters
        if not all(isinstance(one, str) for one in given):
            filters.read_ids()
        encoded = [served.model.encode_prompt(filters.read(one)) if isinstance(one, str) else one for one in given]
        return [tuple(ids) for ids in encoded]

    prompts = await asyncio.to_thread(encode)
    if not prompts:
        raise ApiError(400, "prompt: got none, must be at least one", "prompt")
    n = read_fields.choices(fields, len(prompts))
    fields.setdefault("max_tokens", 16)  # OpenAI's default
    constraint = None
    if asked_for is not None:
        constraint = await structure.constraint(service.compiling, served.engine, *asked_for)
    asked = [to_engine(served, fields, prompt, client, constraint) for prompt in prompts]
    wants, echo = "logprobs" in fields, bool(fields.get("echo"))
    form = replies.Completion(name, served.model.tokenizer, wants, asked[0].alternatives, echo)
    return await reply(service, http, client, served, form, asked, n, fields, ignored)
