"""Options of `gptjax serve`: limits, who may ask, and what is kept."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptjax.io import API_KEY

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.serve.access import Policy
    from gptjax.serve.filters import Filters


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server; requests beyond them get status 429."""

    requests: int = 500
    """Maximum number of requests that are answered at a time, waiting ones included."""
    request_seconds: float = 600.0
    """Seconds after which a request is cancelled."""
    queue_tokens: int | None = None
    """Maximum number of tokens, of prompts and replies together, of all that waits or runs. None: no limit."""
    connections: int = 1_000
    """Maximum number of open connections."""
    drain_seconds: float = 30.0
    """Seconds for running replies after SIGTERM or Ctrl-C. Meanwhile /ready and new requests get status 503."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < (0 if field.name == "drain_seconds" else 1):
                from gptjax.types import UserError

                raise UserError(f"{field.name}: got {value}, must be at least 1")


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask."""

    keys: Path | None = None
    """File of API keys, one of which every request must bring; `gptjax keys` adds and revokes them while the server
    runs. For a single key, GPTJAX_API_KEY will do."""
    without_keys: bool = False
    """Listen on a public address without API keys."""
    cors_origin: tuple[str, ...] = ()
    """Other sites whose pages may ask from a browser, such as https://example.org."""
    mask: Literal["none", "inputs", "outputs", "both"] = "none"
    """Replace e-mail addresses, telephone numbers, and numbers of cards and bank accounts by marks: in what clients
    send, in what models write, or in both."""
    mask_region: str = "US"
    """Country, as ISO 3166 names it, of telephone numbers without a country code."""
    refuse: Path | None = None
    """File of phrases, one per line: requests with one are refused, replies end before it."""
    audit: Path | None = None
    """File for a log of who asked when, for which model and how many tokens, without content."""
    store: Path | None = None
    """File for the responses of /v1/responses, encrypted; clients refer to them with `previous_response_id`."""
    store_key: Path | None = None
    """File of its key, which `gptjax store key` makes. None: GPTJAX_STORE_KEY."""
    store_days: float | None = None
    """Days after which responses are deleted. None: never."""
    tls_cert: Path | None = None
    """File of a certificate, for HTTPS."""
    tls_key: Path | None = None
    """File of its private key."""

    def policy(self, host: str, limits: Limits) -> Policy:
        """The rules for a server at this address. Raises UserError for a public one without keys."""
        from gptjax.cli.store import open_store
        from gptjax.serve.access import LOOPBACK, Policy
        from gptjax.serve.audit import AuditLog
        from gptjax.serve.keys import Keys
        from gptjax.types import UserError

        keys = Keys(self.keys, [key] if (key := os.environ.get(API_KEY, "").strip()) else [])
        local = host == "localhost" or _is_loopback(host)
        if not local and not keys and not self.without_keys:
            raise UserError(
                f"host: got {host}, which others can reach, without API keys; give --keys or {API_KEY}, or "
                "--without_keys"
            )
        for origin in self.cors_origin:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise UserError(f"cors_origin: got {origin}, must be a scheme and a host, such as https://example.org")
        return Policy(
            keys=keys,
            filters=self._filters(),
            audit=None if self.audit is None else AuditLog(self.audit),
            hosts=LOOPBACK if local else None,
            store=None if self.store is None else open_store(self.store, self.store_key),
            store_days=self.store_days,
            origins=self.cors_origin,
            requests=limits.requests,
            request_seconds=limits.request_seconds,
            queue_tokens=limits.queue_tokens,
        )

    def _filters(self) -> Filters:
        from gptjax.data.masks import Mask
        from gptjax.serve.filters import Filters, Refuse

        masks = () if self.mask == "none" else (Mask(self.mask_region),)
        refuse = () if self.refuse is None else (Refuse.of(self.refuse),)
        inputs, outputs = (masks if self.mask in (side, "both") else () for side in ("inputs", "outputs"))
        return Filters((*inputs, *refuse), (*outputs, *refuse))

    def tls(self) -> tuple[str, str] | None:
        """Files of the certificate and the key. Raises UserError for one without the other, or a bad one."""
        import ssl

        from gptjax.types import UserError

        if self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise UserError("tls_cert: got one file, must be given with tls_key: a certificate and its key")
        files = str(self.tls_cert), str(self.tls_key)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files)
        except OSError as error:  # ssl.SSLError is one
            raise UserError(f"tls_cert: got {files[0]} and {files[1]}, which cannot be used: {error}") from None
        return files


def check_address(host: str, port: int) -> None:
    """Raise UserError for an address that a server cannot listen on: now, not after models are loaded."""
    import socket

    from gptjax.types import UserError

    if not 1 <= port <= 65_535:
        raise UserError(f"port: got {port}, must be 1 to 65535")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        field, value = ("host", host) if isinstance(error, socket.gaierror) else ("port", port)
        raise UserError(f"{field}: got {value}, where nothing can listen ({error.strerror}); choose another") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
