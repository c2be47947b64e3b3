"""Who may ask, how much, and what is kept of it: a server's policy, and the client of one request."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from gptjax.inference.engine import Generation
from gptjax.serve.audit import AuditLog
from gptjax.serve.errors import ApiError
from gptjax.serve.filters import Filters
from gptjax.serve.keys import ANYONE, Key, Keys
from gptjax.serve.store import Store
from gptjax.types import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Rules of a server, for all its models."""

    keys: Keys = dataclasses.field(default_factory=Keys)
    """Keys, one of which every request must bring, but for the routes that are open. None in it: anyone may ask."""
    hosts: Sequence[str] | None = LOOPBACK
    """Names under which it may be asked, against pages of other sites that rebind a name of theirs to this address.
    None: any."""
    filters: Filters = Filters()
    """Filters of what clients send and of what models write."""
    audit: AuditLog | None = None
    """Log of who asked when. None: none."""
    store: Store | None = None
    """Store of responses, which clients then refer to. None: nothing is kept."""
    store_days: float | None = None
    """Days after which they are deleted. None: never."""
    origins: tuple[str, ...] = ()
    """Other sites whose pages may ask from a browser (CORS), such as https://example.org."""
    requests: int = 500
    """Maximum number of requests that are answered at a time; more get status 429."""
    request_seconds: float = 600.0
    """Seconds after which a request is cancelled."""
    queue_tokens: int | None = None
    """Maximum number of tokens, of prompts and replies together, of all requests that wait or run. None: no limit."""


@dataclasses.dataclass(eq=False)
class Client:
    """A client, for the time of one request."""

    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    """Our own name of the request."""
    address: str = ""
    method: str = ""
    path: str = ""
    route: str = ""
    """The path as the table of routes has it."""
    caller_id: str | None = None
    """The client's own name of the request, which is only echoed."""
    status: int = 0
    """Status of the reply. 0: the client left before it."""
    model: str = ""
    key: Key = ANYONE
    """Fair queues and shared prefixes are by its digest."""
    asked: float = dataclasses.field(default_factory=time.time)
    """Seconds since 1970."""
    texts: list[Generation] = dataclasses.field(default_factory=list)
    """Texts that the engine writes for it."""
    tokens: int = 0
    """Number of tokens that were read for it beside the prompts of `texts`."""
    detached: bool = False
    """True: what it asked for goes on after the request; `Service.end` is called then."""
    at_end: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    """Calls when the request has ended, however it did."""

    @property
    def usage(self) -> tuple[int, int]:
        """Numbers of tokens read and written."""
        read = sum(len(text.request.prompt) for text in self.texts if text.request.choice == 0)
        return self.tokens + read, sum(len(text.tokens) for text in self.texts)

    def record(self) -> dict[str, Any]:
        """A line of the audit log."""
        read, written = self.usage
        return {
            "time": datetime.datetime.fromtimestamp(self.asked, datetime.UTC).isoformat(timespec="milliseconds"),
            "request": self.id,
            **({} if self.caller_id is None else {"caller_id": self.caller_id}),
            "key": self.key.name,
            "address": self.address,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "status": self.status,
            "prompt_tokens": read,
            "completion_tokens": written,
            "seconds": round(time.time() - self.asked, 3),
        }


def check_host(http: HttpRequest, hosts: Sequence[str] | None) -> None:
    """Raise `ApiError` for a request under another name. None: any."""
    name = http.url.hostname
    if hosts is not None and name not in hosts:
        raise ApiError(403, f"host: got {name}, must be one of {', '.join(hosts)}")


def key_of(http: HttpRequest, keys: Keys, scope: str | None) -> Key:
    """The key of a request. Raises `ApiError` if it does not open this scope. None: every key does."""
    key = ANYONE
    if keys:
        scheme, _, secret = http.headers.get("authorization", "").partition(" ")
        try:
            found = keys.find(secret.strip())
        except UserError as error:
            raise ApiError(503, str(error)) from None
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if found.expired:
            raise ApiError(401, "the API key has expired", code="invalid_api_key")
        key = found
    if scope is not None and scope not in key.scopes:
        raise ApiError(403, f"this API key does not open {scope}, only {', '.join(key.scopes)}", code="missing_scope")
    return key


def caller_id(http: HttpRequest) -> str | None:
    """The client's own name of the request, if it is one that can be shown."""
    given = http.headers.get("x-request-id", "")
    return given if given.isascii() and given.isprintable() and 0 < len(given) <= 100 else None
