"""POST /admin/reload"""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gptjax.serve.access import Client
from gptjax.serve.service import Service, body


async def reload(service: Service, http: HttpRequest, client: Client) -> Response:
    """Load all models anew from their folders, while the former ones go on."""
    await body(http)
    await service.reload()
    return JSONResponse({"models": [*service.models, *service.encoders]})
