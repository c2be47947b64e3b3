"""The HTTP application, plain ASGI over Starlette: OpenAI's interface, the page, health and metrics.

app = make_app({"quickstart": Served(lm, lm.engine())}, keys=("secret",))
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gptjax.data.chat import conversation
from gptjax.inference.engine import Busy, Engine, Generation, Request
from gptjax.inference.sampling import Sampling
from gptjax.io.json_file import FLAG, NATURAL, TEXT
from gptjax.models.language_model import LanguageModel
from gptjax.serve import fields as read_fields
from gptjax.serve import replies
from gptjax.serve.errors import ApiError, of_user_error
from gptjax.types import UserError

BODY = 10 * 2**20
"""Maximum bytes of a request's body."""
STUCK = 30.0
"""Seconds without a finished round, while texts are written, after which the service counts as dead."""
PAGE_POLICY = "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and its engine."""

    model: LanguageModel
    engine: Engine


def make_app(
    models: Mapping[str, Served], keys: Sequence[str] = (), hosts: Sequence[str] | None = LOOPBACK
) -> Starlette:
    """The application.

    models  by name; the first is the default of the page
    keys    API keys, one of which every request must bring, but /health. None given: anyone may ask
    hosts   names under which it may be asked, against pages of other sites that rebind a name of theirs to this
            address. None: any
    """
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    routes = _Routes(models)

    def guarded(endpoint: Callable[[HttpRequest, str], Awaitable[Response]], open_to_all: bool = False):
        async def answer(http: HttpRequest) -> Response:
            identity = _identity(http)
            try:
                _check_host(http, hosts)
                client = "" if open_to_all else _client(http, digests)
                response = await endpoint(http, client)
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

    paths = {
        ("POST", "/v1/chat/completions"): routes.chat,
        ("POST", "/v1/completions"): routes.complete,
        ("GET", "/v1/models"): routes.list_models,
        ("POST", "/tokenize"): routes.tokenize,
        ("POST", "/detokenize"): routes.detokenize,
        ("GET", "/metrics"): routes.metrics,
    }
    table = [Route(path, guarded(endpoint), methods=[method]) for (method, path), endpoint in paths.items()]
    # Neither says anything about anybody: the page asks for the key itself.
    table += [
        Route("/health", guarded(routes.health, open_to_all=True)),
        Route("/", guarded(routes.page, open_to_all=True)),
    ]
    handlers: dict[Any, Any] = {404: missing, 405: wrong_method, 500: broken}
    return Starlette(routes=table, lifespan=lifespan, exception_handlers=handlers)


class _Routes:
    def __init__(self, models: Mapping[str, Served]):
        self.models, self.started = models, int(time.time())

    async def chat(self, http: HttpRequest, client: str) -> Response:
        fields, ignored = read_fields.read(await _body(http), read_fields.CHAT)
        name, served = self._served(fields)
        _require(fields, "messages")
        wants = fields.get("logprobs", False)
        if "top_logprobs" in fields and not wants:
            raise ApiError(400, 'top_logprobs: got one without "logprobs": true', "top_logprobs")

        def encode() -> tuple[int, ...]:  # templates and tokenizers take their time: not in the event loop
            roles = {"developer": "system"}
            said = [{**m, "role": roles.get(m.get("role", ""), m.get("role"))} for m in fields["messages"]]
            talk = [*conversation(said, fields.get("tools"))]
            if not talk:
                raise UserError("messages: got none, must be at least one")
            variables = fields.get("chat_template_kwargs")
            if fields.get("truncation") == "auto":
                talk, _ = served.model.trim(talk, fields.get("max_completion_tokens", fields.get("max_tokens")))
            return tuple(served.model.encode_chat(talk, variables))

        prompt = await asyncio.to_thread(encode)
        n = read_fields.choices(fields)
        asked = self._asked(served, fields, prompt, client)
        form = replies.Chat(name, served.model.tokenizer, wants, asked.alternatives)
        return await self._reply(http, served, form, [asked], n, fields, ignored)

    async def complete(self, http: HttpRequest, client: str) -> Response:
        fields, ignored = read_fields.read(await _body(http), read_fields.COMPLETION)
        name, served = self._served(fields)
        _require(fields, "prompt")

        def encode() -> list[tuple[int, ...]]:
            given = fields["prompt"]
            given = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
            encoded = [served.model.encode_prompt(one) if isinstance(one, str) else one for one in given]
            return [tuple(ids) for ids in encoded]

        prompts = await asyncio.to_thread(encode)
        if not prompts:
            raise ApiError(400, "prompt: got none, must be at least one", "prompt")
        n = read_fields.choices(fields, len(prompts))
        fields.setdefault("max_tokens", 16)  # OpenAI's default
        asked = [self._asked(served, fields, prompt, client) for prompt in prompts]
        form = replies.Completion(name, served.model.tokenizer, "logprobs" in fields, asked[0].alternatives)
        return await self._reply(http, served, form, asked, n, fields, ignored)

    async def list_models(self, http: HttpRequest, client: str) -> Response:
        about = {"object": "model", "created": self.started, "owned_by": "gptjax"}
        data = [{"id": name, **about, "max_model_len": served.engine.context} for name, served in self.models.items()]
        return JSONResponse({"object": "list", "data": data})

    async def tokenize(self, http: HttpRequest, client: str) -> Response:
        schema = {"model": TEXT, "prompt": TEXT, "add_special_tokens": FLAG}
        fields, _ = read_fields.read(await _body(http), schema)
        _, served = self._served(fields)
        _require(fields, "prompt")
        model = served.model
        encode = model.encode_prompt if fields.get("add_special_tokens", True) else model.tokenizer.encode
        ids = await asyncio.to_thread(encode, fields["prompt"])
        return JSONResponse({"tokens": list(ids), "count": len(ids), "max_model_len": served.engine.context})

    async def detokenize(self, http: HttpRequest, client: str) -> Response:
        fields, _ = read_fields.read(await _body(http), {"model": TEXT, "tokens": [NATURAL]})
        _, served = self._served(fields)
        _require(fields, "tokens")
        if fields["tokens"] and max(fields["tokens"]) >= served.model.tokenizer.vocab:
            raise ApiError(400, f"tokens: must be less than {served.model.tokenizer.vocab}", "tokens")
        text = await asyncio.to_thread(served.model.tokenizer.decode, fields["tokens"])
        return JSONResponse({"prompt": text})

    async def health(self, http: HttpRequest, client: str) -> Response:
        for served in self.models.values():
            engine = served.engine
            stuck = engine.active > 0 and time.monotonic() - engine.last_round > STUCK
            if engine.broken is not None or stuck:
                raise ApiError(503, "the engine is broken" if engine.broken is not None else "the engine is stuck")
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: HttpRequest, client: str) -> Response:
        meanings = {
            "requests_running": ("gauge", "Texts that have a row", lambda e: e.active),
            "requests_waiting": ("gauge", "Requests that wait", lambda e: e.waiting),
            "pages_used_ratio": ("gauge", "Part of the pages that have readers", _used),
            "tokens_written_total": ("counter", "Tokens written", lambda e: e.written),
            "prefix_tokens_reused_total": ("counter", "Tokens of prompts found in pages", lambda e: e.pages.hits),
            "preemptions_total": ("counter", "Texts that gave up their pages", lambda e: e.preempted),
        }
        lines = []
        for name, (kind, meaning, value) in meanings.items():
            lines += [f"# HELP gptjax_{name} {meaning}", f"# TYPE gptjax_{name} {kind}"]
            lines += [f'gptjax_{name}{{model="{m}"}} {value(served.engine)}' for m, served in self.models.items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def page(self, http: HttpRequest, client: str) -> Response:
        nonce = secrets.token_urlsafe(16)
        html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        headers = {"content-security-policy": PAGE_POLICY.format(nonce=nonce), "referrer-policy": "no-referrer"}
        return HTMLResponse(html, headers={**headers, "x-content-type-options": "nosniff"})

    def _served(self, fields: Mapping[str, Any]) -> tuple[str, Served]:
        name = fields.get("model", next(iter(self.models)))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"model: got {name!r}, must be one of {known}", "model", "model_not_found")
        return name, self.models[name]

    def _asked(self, served: Served, fields: Mapping[str, Any], prompt: tuple[int, ...], client: str) -> Request:
        base = served.model.sampling or Sampling()
        return read_fields.request(fields, prompt, served.engine.context - len(prompt), base, client)

    async def _reply(
        self,
        http: HttpRequest,
        served: Served,
        form: replies.Format,
        asked: Sequence[Request],
        n: int,
        fields: Mapping[str, Any],
        ignored: Sequence[str],
    ) -> Response:
        texts: list[Generation] = []
        engine, headers = served.engine, {"x-ignored-fields": json.dumps(ignored)[:500]} if ignored else {}
        try:
            for one in asked:
                texts += [engine.submit(dataclasses.replace(one, choice=i)) for i in range(n)]
        except UserError:
            for text in texts:
                engine.cancel(text)
            raise
        if fields.get("stream"):
            include_usage = fields.get("stream_options", {}).get("include_usage", False)
            events = replies.stream(form, texts, len(asked), include_usage, engine.cancel)
            headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        gone = asyncio.create_task(_gone(http))
        done = asyncio.create_task(replies.collect(form, texts, len(asked)))
        try:
            await asyncio.wait([gone, done], return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ApiError(499, "the client is gone")
            return JSONResponse(done.result(), headers=headers)
        finally:
            for task in (gone, done):
                task.cancel()
            for text in texts:
                engine.cancel(text)


def _used(engine: Engine) -> float:
    return 1 - engine.pages.free / engine.pages.count


async def _gone(http: HttpRequest) -> None:
    """Wait until the client closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _body(http: HttpRequest) -> dict[str, Any]:
    """The request's JSON object."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site may not send unasked
        raise ApiError(415, f"content-type: got {kind or 'none'}, must be application/json")
    data = bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > BODY:
            raise ApiError(413, f"the body has more than {BODY:,} bytes")
    try:
        body = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


def _require(fields: Mapping[str, Any], name: str) -> None:
    if name not in fields:
        raise ApiError(400, f"{name}: got none, must be given", name)


def _check_host(http: HttpRequest, hosts: Sequence[str] | None) -> None:
    name = http.url.hostname
    if hosts is not None and name not in hosts:
        raise ApiError(403, f"host: got {name}, must be one of {', '.join(hosts)}")


def _client(http: HttpRequest, digests: Sequence[bytes]) -> str:
    """The client whose key this is: the digest of the key. Raises `ApiError` for none."""
    if not digests:
        return ""
    scheme, _, key = http.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode()).digest()
    matches = [hmac.compare_digest(digest, known) for known in digests]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
    return digest.hex()


def _identity(http: HttpRequest) -> str:
    """Identity of the request for logs: the client's, if it sent one that can be shown."""
    given = http.headers.get("x-request-id", "")
    return given if given.isascii() and given.isprintable() and 0 < len(given) <= 100 else secrets.token_hex(8)


def _failed(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
