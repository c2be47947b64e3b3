"""GET /: the page to chat in."""

from __future__ import annotations

import secrets
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from gptjax.serve.access import Client
from gptjax.serve.service import Service

POLICY = "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"


async def page(service: Service, http: HttpRequest, client: Client) -> Response:
    """The page, under a policy that lets nothing else run or load."""
    nonce = secrets.token_urlsafe(16)
    html = (Path(__file__).parents[1] / "page.html").read_text(encoding="utf-8").replace("{{nonce}}", nonce)
    headers = {"content-security-policy": POLICY.format(nonce=nonce), "referrer-policy": "no-referrer"}
    return HTMLResponse(html, headers={**headers, "x-content-type-options": "nosniff"})
