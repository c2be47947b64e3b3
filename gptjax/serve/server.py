"""The HTTP server: uvicorn, with limits for clients that send too much or too slowly, and an end that loses no reply.

Server(app, port=8000).run()         # until SIGTERM or Ctrl-C, and the end of the running replies
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service
from gptjax.types import one_line

HEAD = 32 * 2**10
"""Maximum bytes of a request's line and headers."""
HEAD_SECONDS = 10.0
"""Seconds that a client may take for them."""
IDLE_SECONDS = 30
"""Seconds without a request after which a connection is closed."""
CLOSING_SECONDS = 2
"""Seconds for what remains to be sent when the engine has stopped."""


_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server of one application.

    connections  maximum number of open ones; more are answered 503 and closed
    drain        seconds for running replies when the server is stopped. Until they have ended, /ready and new requests
                 get status 503; a second signal does not wait
    tls          files of a certificate and its key, for HTTPS
    """

    def __init__(
        self,
        app: Starlette,
        host: str = "127.0.0.1",
        port: int = 8000,
        connections: int = 1_000,
        drain: float = 30.0,
        tls: tuple[str, str] | None = None,
    ):
        class Protocol(_Protocol):
            limit = connections

        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Protocol,
            ws="none",
            log_level="warning",
            server_header=False,
            h11_max_incomplete_event_size=HEAD,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            ssl_certfile=tls[0] if tls else None,
            ssl_keyfile=tls[1] if tls else None,
        )
        super().__init__(config)
        self._service: Service = app.state.service
        self._drain, self._deadline = drain, 0.0

    async def startup(self, sockets: Any = None) -> None:
        """Listen. From then on SIGHUP loads the models anew."""
        await super().startup(sockets)
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        async def reload() -> None:
            try:
                await self._service.reload()
            except Exception as error:
                _log.error("the models stay as they are: %s", one_line(error))

        self._reloading = asyncio.create_task(reload())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, as SIGTERM and Ctrl-C do; the second time, stop."""
        if self._service.draining:
            self.should_exit = True
        else:
            self._deadline, self._service.draining = time.monotonic() + self._drain, True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: True to stop."""
        ended = self._service.draining and (
            not (self._service.active or self._service.live.running) or time.monotonic() > self._deadline
        )
        stop = await super().on_tick(counter) or ended
        if stop:
            await asyncio.to_thread(self._service.close)  # what still runs is told so
        return stop


class _Protocol(H11Protocol):
    """A connection. Its errors have the shape of OpenAI's interface."""

    limit: int
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            self._refuse(ApiError(503, "too many connections"))
        else:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or too much; called while uvicorn handles the error."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        self._refuse(
            ApiError(status, f"the line and the headers have more than {HEAD:,} bytes" if status == 431 else msg)
        )

    def _late(self) -> None:
        self._timer = None
        self._refuse(ApiError(408, f"the request took longer than {HEAD_SECONDS:g} s"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            events = [
                h11.Response(status_code=error.status, headers=[*headers.items()], reason=b""),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
