"""The HTTP application, plain ASGI over Starlette: OpenAI's interface, the page, health and metrics.

app = make_app({"quickstart": Served(lm, lm.engine())}, keys=("secret",))
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptjax.inference.engine import Busy
from gptjax.serve import access
from gptjax.serve.errors import ApiError, of_user_error
from gptjax.serve.routes import chat, completions, page, status, tokens
from gptjax.serve.service import Served, Service
from gptjax.types import UserError

Endpoint = Callable[[Service, HttpRequest, str], Awaitable[Response]]

ROUTES: dict[tuple[str, str], Endpoint] = {
    ("POST", "/v1/chat/completions"): chat.chat,
    ("POST", "/v1/completions"): completions.complete,
    ("GET", "/v1/models"): status.list_models,
    ("POST", "/tokenize"): tokens.tokenize,
    ("POST", "/detokenize"): tokens.detokenize,
    ("GET", "/metrics"): status.metrics,
}
OPEN_ROUTES: dict[str, Endpoint] = {"/health": status.health, "/": page.page}
"""Routes that need no key: neither says anything about anybody, and the page asks for the key."""


def make_app(
    models: Mapping[str, Served], keys: Sequence[str] = (), hosts: Sequence[str] | None = access.LOOPBACK
) -> Starlette:
    """The application.

    models  by name; the first is the default of the page
    keys    API keys, one of which every request must bring, but /health. None given: anyone may ask
    hosts   names under which it may be asked, against pages of other sites that rebind a name of theirs to this
            address. None: any
    """
    digests, service = access.digests(keys), Service(models)

    def guarded(endpoint: Endpoint, open_to_all: bool = False):
        async def answer(http: HttpRequest) -> Response:
            identity = access.identity(http)
            try:
                access.check_host(http, hosts)
                client = "" if open_to_all else access.client(http, digests)
                response = await endpoint(service, http, client)
            except UserError as error:
                response = _failed(ApiError(429, str(error)) if isinstance(error, Busy) else of_user_error(error))
            except ApiError as error:
                response = _failed(error)
            response.headers["x-request-id"] = identity
            return response

        return answer

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for served in models.values():
            await asyncio.to_thread(served.engine.close)

    async def missing(http: HttpRequest, error: Exception) -> Response:
        return _failed(ApiError(404, f"there is no {http.url.path}"))

    async def wrong_method(http: HttpRequest, error: Exception) -> Response:
        return _failed(ApiError(405, f"{http.url.path} does not take {http.method}"))

    async def broken(http: HttpRequest, error: Exception) -> Response:
        return _failed(ApiError(500, "the server made a mistake; its log has more"))

    table = [Route(path, guarded(endpoint), methods=[method]) for (method, path), endpoint in ROUTES.items()]
    table += [Route(path, guarded(endpoint, open_to_all=True)) for path, endpoint in OPEN_ROUTES.items()]
    handlers: dict[Any, Any] = {404: missing, 405: wrong_method, 500: broken}
    return Starlette(routes=table, lifespan=lifespan, exception_handlers=handlers)


def _failed(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
