"""The guard of a route: it asks who comes, counts what they use, and turns errors into replies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gptjax.inference.engine import Busy
from gptjax.serve import access
from gptjax.serve.errors import ApiError, of_user_error
from gptjax.serve.filters import Refused
from gptjax.serve.service import Service
from gptjax.types import UserError

BUSY = "server_busy"
LATE = 10.0
"""Seconds after the end of a request's time, of which the client is told, until its connection is closed."""
_log = logging.getLogger(__name__)
Endpoint = Callable[[Service, HttpRequest, access.Client], Awaitable[Response]]


class Guard:
    """A route as an ASGI application.

    scope       what a key must open. None: any key will do
    needs_key   False: open to all
    """

    def __init__(
        self, service: Service, path: str, endpoint: Endpoint, scope: str | None = None, needs_key: bool = True
    ):
        self._service, self._path, self._endpoint = service, path, endpoint
        self._scope, self._needs_key = scope, needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, http = self._service, HttpRequest(scope, receive)
        client = access.Client(
            address=http.client.host if http.client else "",
            method=http.method,
            path=http.url.path,
            route=self._path,
            caller_id=access.caller_id(http),
        )

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                client.status = message["status"]
            await send(message)

        service.active += self._needs_key
        try:
            async with asyncio.timeout(service.policy.request_seconds + LATE):
                response = await self._answer(http, client)
                await response(scope, receive, note)
        except ClientDisconnect:
            pass  # before its body was read
        except TimeoutError:
            _log.warning("request %s: the client does not read; the connection is closed", client.id)
        finally:
            service.active -= self._needs_key
            if not self._needs_key:  # probes are not noted
                client.at_end.close()
            elif not client.detached:
                service.end(client)

    async def _answer(self, http: HttpRequest, client: access.Client) -> Response:
        service, quotas = self._service, {}
        try:
            access.check_host(http, service.policy.hosts)
            if self._needs_key:
                client.key = access.key_of(http, service.policy.keys, self._scope)
                if service.draining:
                    raise ApiError(503, "the server is stopping")
                if service.active > service.policy.requests:
                    raise ApiError(429, f"the server is answering {service.policy.requests:,} requests", code=BUSY)
                service.quotas.request(client.key)
            response = await self._endpoint(service, http, client)
            quotas = service.quotas.headers(client.key)
        except Busy as error:
            response = failed(ApiError(429, str(error), code=BUSY))
        except Refused as error:
            response = failed(ApiError(400, str(error), code="content_filter"))
        except UserError as error:
            response = failed(of_user_error(error))
        except ApiError as error:
            response = failed(error)
        response.headers.update({**quotas, "x-request-id": client.caller_id or client.id})
        return response


def failed(error: ApiError) -> Response:
    """The reply that tells an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
