"""GET /v1/models, /health, /ready, /metrics"""

from __future__ import annotations

import time

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gptjax.serve.access import Client
from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service

STUCK = 30.0
"""Seconds without a finished round, while texts are written, after which the service counts as dead."""


async def list_models(service: Service, http: HttpRequest, client: Client) -> Response:
    """Names and contexts of the models."""
    about = {"object": "model", "created": service.started, "owned_by": "gptjax"}
    data = [{"id": name, **about, "max_model_len": served.engine.context} for name, served in service.models.items()]
    data += [{"id": name, **about, "max_model_len": e.config.max_positions} for name, e in service.encoders.items()]
    return JSONResponse({"object": "list", "data": data})


async def health(service: Service, http: HttpRequest, client: Client) -> Response:
    """503 if an engine is broken or stuck."""
    for served in service.models.values():
        engine = served.engine
        stuck = engine.active > 0 and time.monotonic() - engine.last_round > STUCK
        if engine.broken is not None or stuck:
            raise ApiError(503, "the engine is broken" if engine.broken is not None else "the engine is stuck")
    return JSONResponse({"status": "ok"})


async def ready(service: Service, http: HttpRequest, client: Client) -> Response:
    """503 if new requests should go elsewhere: the server is stopping, or is not healthy."""
    if service.draining:
        raise ApiError(503, "the server is stopping")
    return await health(service, http, client)


async def metrics(service: Service, http: HttpRequest, client: Client) -> Response:
    """Numbers for Prometheus."""
    lines = service.metrics.lines(
        {name: served.engine for name, served in service.models.items() if not served.adapter}
    )
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
