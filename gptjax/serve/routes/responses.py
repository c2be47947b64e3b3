"""POST /v1/responses, GET and DELETE /v1/responses/ID"""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gptjax.serve import fields as read_fields
from gptjax.serve import responses
from gptjax.serve.access import Client
from gptjax.serve.errors import ApiError
from gptjax.serve.routes.chat import answer
from gptjax.serve.service import Service, apart, body, require
from gptjax.serve.store import Store


async def respond(service: Service, http: HttpRequest, client: Client) -> Response:
    """A response to items, and to the response before them."""
    given = await body(http)
    fields, ignored = await apart(http, lambda: responses.read(given))
    require(fields, "input")
    store, previous = service.policy.store, fields.get("previous_response_id")
    if store is None:
        for name in ("previous_response_id", "store"):
            if fields.get(name):
                raise ApiError(400, f"{name}: this server keeps no responses; send the whole conversation", name)
    fields.setdefault("store", store is not None)  # OpenAI's default, where it can be
    items = responses.items(fields["input"])
    if previous is not None and store is not None:
        found = await asyncio.to_thread(store.get, previous, client.key.digest)
        if found is None:
            raise _unknown(previous, "previous_response_id")
        items = [*found["items"], *items]
    asked, _ = read_fields.read(responses.as_chat({**fields, "input": items}), read_fields.CHAT)

    async def keep(response: dict[str, Any]) -> None:
        if store is None or not fields["store"]:
            return
        read = [responses.with_texts(item, service.policy.filters.read) for item in items]
        content = {"items": [*read, *response["output"]], "response": response}
        try:
            await asyncio.to_thread(store.put, response["id"], client.key, content)
        except sqlite3.Error as error:
            raise ApiError(500, f"the response cannot be kept: {error}") from None

    return await answer(service, http, client, asked, ignored, partial(responses.Responses, fields, keep))


async def get(service: Service, http: HttpRequest, client: Client) -> Response:
    """A response that was kept."""
    identity, store = http.path_params["id"], _store(service)
    found = await asyncio.to_thread(store.get, identity, client.key.digest)
    if found is None:
        raise _unknown(identity)
    return JSONResponse(found["response"])


async def delete(service: Service, http: HttpRequest, client: Client) -> Response:
    """Delete a response that was kept."""
    identity, store = http.path_params["id"], _store(service)
    if not await asyncio.to_thread(store.remove, identity, client.key.digest):
        raise _unknown(identity)
    return JSONResponse({"id": identity, "object": "response", "deleted": True})


def _store(service: Service) -> Store:
    if service.policy.store is None:
        raise ApiError(404, "this server keeps no responses")
    return service.policy.store


def _unknown(identity: str, param: str | None = None) -> ApiError:
    return ApiError(404, f"there is no response {identity[:100]!r} of this key", param)
