"""Who may ask: names of the host, and API keys."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from starlette.requests import Request as HttpRequest

from gptjax.serve.errors import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def digests(keys: Sequence[str]) -> list[bytes]:
    """SHA-256 of each key."""
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def check_host(http: HttpRequest, hosts: Sequence[str] | None) -> None:
    """Raise `ApiError` for a request under another name. None: any."""
    name = http.url.hostname
    if hosts is not None and name not in hosts:
        raise ApiError(403, f"host: got {name}, must be one of {', '.join(hosts)}")


def client(http: HttpRequest, known: Sequence[bytes]) -> str:
    """The client whose key this is: the digest of the key. Raises `ApiError` for none of the known ones."""
    if not known:
        return ""
    scheme, _, key = http.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode()).digest()
    matches = [hmac.compare_digest(digest, one) for one in known]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
    return digest.hex()


def identity(http: HttpRequest) -> str:
    """Identity of the request for logs: the client's, if it sent one that can be shown."""
    given = http.headers.get("x-request-id", "")
    return given if given.isascii() and given.isprintable() and 0 < len(given) <= 100 else secrets.token_hex(8)
