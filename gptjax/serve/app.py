"""The HTTP application, plain ASGI over Starlette: OpenAI's interface, the page, health and metrics.

app = make_app({"quickstart": Served(lm, lm.engine())}, Policy(keys=Keys(Path("keys.json"))))
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptjax.models.model import TextEncoder
from gptjax.serve import openapi
from gptjax.serve.access import Client, Policy
from gptjax.serve.errors import ApiError
from gptjax.serve.guard import Endpoint, Guard, failed
from gptjax.serve.keys import DAY
from gptjax.serve.routes import admin, chat, completions, embeddings, page, responses, status, tokens
from gptjax.serve.service import Served, Service


async def describe(service: Service, http: HttpRequest, client: Client) -> Response:
    """This interface, as an OpenAPI document."""
    routes = [(method, path, endpoint, True) for (method, path), (endpoint, _) in ROUTES.items()]
    routes += [("GET", path, endpoint, False) for path, endpoint in OPEN_ROUTES.items()]
    return JSONResponse(openapi.document([(m, p, (e.__doc__ or "").partition("\n")[0], k) for m, p, e, k in routes]))


ROUTES: dict[tuple[str, str], tuple[Endpoint, str | None]] = {
    ("POST", "/v1/chat/completions"): (chat.chat, "chat"),
    ("POST", "/v1/completions"): (completions.complete, "completions"),
    ("GET", "/openapi.json"): (describe, None),
    ("GET", "/v1/models"): (status.list_models, None),
    ("POST", "/v1/responses"): (responses.respond, "chat"),
    ("GET", "/v1/responses/{id}"): (responses.get, "chat"),
    ("DELETE", "/v1/responses/{id}"): (responses.delete, "chat"),
    ("POST", "/v1/embeddings"): (embeddings.embed, "embeddings"),
    ("POST", "/admin/reload"): (admin.reload, "admin"),
    ("POST", "/tokenize"): (tokens.tokenize, None),
    ("POST", "/detokenize"): (tokens.detokenize, None),
    ("GET", "/metrics"): (status.metrics, "metrics"),
    ("POST", "/page/replies"): (page.start, "chat"),
    ("GET", "/page/replies/{id}"): (page.read, "chat"),
    ("POST", "/page/replies/{id}/stop"): (page.stop, "chat"),
    ("DELETE", "/page/replies/{id}"): (page.forget, "chat"),
    ("POST", "/page/markdown"): (page.markdown, "chat"),
}
"""Each with the scope that a key must have. None: any key will do."""
OPEN_ROUTES: dict[str, Endpoint] = {
    "/health": status.health,
    "/ready": status.ready,
    "/": page.page,
    "/assets/{name}": page.asset,
}
"""Routes that need no key: none says anything about anybody, and the page asks for the key."""


async def _forget(policy: Policy) -> None:
    """Delete what is older than the policy keeps it, every hour."""
    while policy.store is not None and policy.store_days is not None:
        await asyncio.to_thread(policy.store.delete, older_than=policy.store_days * DAY)
        await asyncio.sleep(3_600)


def make_app(
    models: Mapping[str, Served],
    policy: Policy | None = None,
    encoders: Mapping[str, TextEncoder] | None = None,
    load: Callable[[], tuple[Mapping[str, Served], Mapping[str, TextEncoder]]] | None = None,
) -> Starlette:
    """The application.

    models    by name; the first is the default of the page
    policy    who may ask, how much, and what is kept. None: `Policy()`, anyone on this machine
    encoders  models that only embed texts, by name. None: none
    load      loads models and encoders anew, for /admin/reload. None: that is refused
    """
    policy = policy or Policy()
    service = Service(models, policy, encoders or {}, load)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        forgetting = asyncio.create_task(_forget(policy))
        yield
        forgetting.cancel()
        await asyncio.to_thread(service.close)
        for record in (policy.audit, policy.store):
            if record is not None:
                record.close()

    async def missing(http: HttpRequest, error: Exception) -> Response:
        return failed(ApiError(404, f"there is no {http.url.path}"))

    async def wrong_method(http: HttpRequest, error: Exception) -> Response:
        return failed(ApiError(405, f"{http.url.path} does not take {http.method}"))

    async def broken(http: HttpRequest, error: Exception) -> Response:
        return failed(ApiError(500, "the server made a mistake; its log has more"))

    table = [Route(path, Guard(service, path, *entry), methods=[method]) for (method, path), entry in ROUTES.items()]
    table += [
        Route(path, Guard(service, path, endpoint, needs_key=False), methods=["GET"])
        for path, endpoint in OPEN_ROUTES.items()
    ]
    handlers: dict[Any, Any] = {404: missing, 405: wrong_method, 500: broken}
    middleware = []
    if policy.origins:
        methods, headers = ("GET", "POST", "DELETE"), ("authorization", "content-type", "x-request-id")
        cors = Middleware(CORSMiddleware, allow_origins=policy.origins, allow_methods=methods, allow_headers=headers)
        middleware.append(cors)
    app = Starlette(routes=table, lifespan=lifespan, exception_handlers=handlers, middleware=middleware)
    app.state.service = service
    return app
