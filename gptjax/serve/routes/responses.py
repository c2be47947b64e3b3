"""POST /v1/responses"""

from __future__ import annotations

from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptjax.serve import fields as read_fields
from gptjax.serve import responses
from gptjax.serve.access import Client
from gptjax.serve.errors import ApiError
from gptjax.serve.routes.chat import answer
from gptjax.serve.service import Service, body, require


async def respond(service: Service, http: HttpRequest, client: Client) -> Response:
    """A response to items."""
    fields, ignored = responses.read(await body(http))
    require(fields, "input")
    for name in ("previous_response_id", "store"):
        if fields.get(name):
            raise ApiError(400, f"{name}: this server keeps no responses; send the whole conversation", name)
    asked, _ = read_fields.read(responses.as_chat(fields), read_fields.CHAT)
    return await answer(service, http, client, asked, ignored, partial(responses.Responses, fields))
