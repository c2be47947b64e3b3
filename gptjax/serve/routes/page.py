"""GET / and /assets: the page to chat in. /page: its replies, which live on the server, and Markdown as HTML."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from gptjax.data.chat import conversation
from gptjax.inference.engine import Request
from gptjax.inference.formats import Reader
from gptjax.io.json_file import FLAG, OBJECT, POSITIVE, TEXT
from gptjax.serve import fields as read_fields
from gptjax.serve.access import Client
from gptjax.serve.answers import to_engine
from gptjax.serve.errors import ApiError
from gptjax.serve.markdown import render
from gptjax.serve.service import Served, Service, fields_of, require
from gptjax.types import UserError

FOLDER = Path(__file__).parents[1] / "page"
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Media types of the page's files."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""Nothing runs or loads but the page's own files, whatever a model writes."""
REPLY: dict[str, Any] = {
    **read_fields.SAMPLING,
    "model": TEXT,
    "messages": [OBJECT],
    "seed": read_fields.SEED,
    "max_tokens": POSITIVE,
    "continue": FLAG,
}
MARKDOWN = {"texts": [TEXT]}
LIKELY = 5
"""Number of likely tokens shown with each token."""
RENDERED = 200_000
"""Maximum characters to render in a request."""


async def page(service: Service, http: HttpRequest, client: Client) -> Response:
    """The page."""
    return Response(_file("index.html"), media_type="text/html", headers=HEADERS)


async def asset(service: Service, http: HttpRequest, client: Client) -> Response:
    """A file of the page."""
    name = http.path_params["name"]
    if name not in _names():
        raise ApiError(404, f"there is no {http.url.path}")
    # The script that keeps the page for when the server is down is the whole site's.
    headers = {**HEADERS, "service-worker-allowed": "/"}
    return Response(_file(name), media_type=KINDS[Path(name).suffix], headers=headers)


async def start(service: Service, http: HttpRequest, client: Client) -> Response:
    """Begin a reply to a conversation, or continue its last message, the assistant's. Returns its id."""
    fields, ignored = await fields_of(http, REPLY)
    if ignored:
        raise ApiError(400, f"{ignored[0]}: unknown field, must be one of {', '.join(REPLY)}", ignored[0])
    name, served = service.choose(fields)
    require(fields, "messages")
    request, reader, prefix, left_out = await asyncio.to_thread(_request, service, served, fields, client)
    charge = service.quotas.admit(client.key, 1, len(request.prompt) + request.max_tokens)
    reply = service.live.start(client.key.digest, served.engine, request, charge, reader, prefix)
    client.model, client.status, client.detached = name, 200, True
    client.texts.append(reply.generation)
    reply.at_end = lambda: service.end(client)
    return JSONResponse({"id": reply.id, "model": name, "left_out": left_out, "prompt_tokens": len(request.prompt)})


async def read(service: Service, http: HttpRequest, client: Client) -> Response:
    """Server-sent events of a reply, from the number `from`, or after the one in the header `Last-Event-ID`."""
    reply = service.live.find(http.path_params["id"], client.key.digest)
    number = http.query_params.get("from", http.headers.get("last-event-id", "0"))
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise ApiError(400, f"from: got {number[:40]!r}, must be the number of an event", "from")

    async def events() -> AsyncIterator[str]:
        async for event in reply.read(int(number)):
            yield ": waiting\n\n" if event is None else f"id: {event[0]}\ndata: {event[1]}\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def stop(service: Service, http: HttpRequest, client: Client) -> Response:
    """End a reply where it is."""
    service.live.find(http.path_params["id"], client.key.digest).stop()
    return JSONResponse({})


async def forget(service: Service, http: HttpRequest, client: Client) -> Response:
    """Stop a reply and remove it from the server."""
    service.live.forget(service.live.find(http.path_params["id"], client.key.digest))
    return JSONResponse({})


async def markdown(service: Service, http: HttpRequest, client: Client) -> Response:
    """HTML of texts in Markdown, a list of blocks for each."""
    fields, _ = await fields_of(http, MARKDOWN)
    require(fields, "texts")
    if sum(map(len, fields["texts"])) > RENDERED:
        raise ApiError(413, f"texts: must have at most {RENDERED:,} characters together", "texts")
    return JSONResponse({"html": await asyncio.to_thread(lambda: [render(text) for text in fields["texts"]])})


def _request(
    service: Service, served: Served, fields: dict[str, Any], client: Client
) -> tuple[Request, Reader, str, int]:
    """The engine's request, the reader of its text, the text that it continues, and the number of messages that did
    not fit."""
    talk, prefix = service.policy.filters.read_messages(conversation(fields["messages"])), ""
    if fields.get("continue"):
        if not talk or talk[-1].role != "assistant":
            raise UserError("messages: got none of the assistant's at the end, must be the one to continue")
        prefix = talk.pop().text
    if not talk:
        raise UserError("messages: got none, must be at least one")
    model, form = served.model, served.format
    begun, wanted = tuple(model.tokenizer.encode(prefix)), fields.get("max_tokens")
    kept, left_out = model.trim(talk, len(begun) + wanted if wanted else None)
    prompt = tuple(model.encode_chat(kept))
    thinking = form.thinking(prompt, model.tokenizer)
    if prefix and thinking:  # what is continued comes after the reasoning
        close, thinking = form.reasoning.close, False
        mark = next((i for i, text in form.marks.items() if text == close), None)
        end = model.tokenizer.encode("\n\n" if mark is not None else f"{close}\n\n")
        begun = (*(() if mark is None else (mark,)), *end, *begun)
    asked = to_engine(served, {**fields, "top_logprobs": LIKELY}, (*prompt, *begun), client, marks=form.marks)
    return asked, form.reader(False, thinking), prefix, left_out


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(path.name for path in FOLDER.iterdir() if path.suffix in KINDS)


@functools.cache
def _file(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
