"""From the fields of a request to texts of the engine, and from those to the HTTP reply."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from gptjax.inference.constraints import Constraint
from gptjax.inference.engine import Generation, Request
from gptjax.inference.sampling import Sampling
from gptjax.serve import fields as read_fields
from gptjax.serve import replies
from gptjax.serve.access import Client
from gptjax.serve.errors import ApiError
from gptjax.serve.filters import attach
from gptjax.serve.service import Served, Service
from gptjax.types import UserError


def to_engine(
    served: Served,
    fields: Mapping[str, Any],
    prompt: tuple[int, ...],
    client: Client,
    constraint: Constraint | None = None,
    marks: Mapping[int, str] | None = None,
) -> Request:
    """The engine's request, with the sampling settings that the model's authors recommend where none are given."""
    base, room = served.model.sampling or Sampling(), served.engine.context - len(prompt)
    asked = read_fields.request(fields, prompt, room, base, client.key.digest, constraint, marks)
    return dataclasses.replace(asked, adapter=served.adapter)


async def reply(
    service: Service,
    http: HttpRequest,
    client: Client,
    served: Served,
    form: replies.Format,
    asked: Sequence[Request],
    n: tuple[int, int],
    fields: Mapping[str, Any],
    ignored: Sequence[str],
) -> Response:
    """Ask the engine and answer, whole or as a stream; the engine stops when the client leaves.

    form     shape of the reply
    asked    a request for each prompt
    n        number of choices of each, and of those that are written for them
    ignored  names of unknown fields
    """
    if form.logprobs and service.policy.filters.outputs:
        raise ApiError(400, "logprobs: would show the tokens, which this server filters", "logprobs")
    client.model = form.model
    choices, best_of = n
    tokens = sum(len(one.prompt) + best_of * one.max_tokens for one in asked)
    charge = service.quotas.admit(client.key, best_of * len(asked), tokens)
    client.at_end.callback(lambda: charge.settle(sum(client.usage)))
    texts: list[Generation] = client.texts
    engine, headers = served.engine, {"x-ignored-fields": json.dumps(ignored)[:500]} if ignored else {}
    try:
        for one in asked:
            for i in range(best_of):
                texts.append(engine.submit(dataclasses.replace(one, choice=i)))
                attach(texts[-1], service.policy.filters.outputs, engine.cancel)
    except UserError:
        for text in texts:
            engine.cancel(text)
        raise
    seconds, loop = service.policy.request_seconds, asyncio.get_running_loop()
    reason = f"the request took longer than {seconds:g} s"
    client.at_end.callback(loop.call_later(seconds, lambda: [engine.cancel(text, reason) for text in texts]).cancel)
    if fields.get("stream"):
        include_usage = fields.get("stream_options", {}).get("include_usage", False)
        events = form.stream(texts, len(asked), include_usage, engine.cancel)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    gone = asyncio.create_task(_gone(http))
    done = asyncio.create_task(form.collect(texts, len(asked), choices))
    try:
        await asyncio.wait([gone, done], return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ApiError(499, "the client is gone")
        return JSONResponse(done.result(), headers=headers)
    finally:
        for task in (gone, done):
            task.cancel()
        for text in texts:
            engine.cancel(text)


async def _gone(http: HttpRequest) -> None:
    """Wait until the client closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
