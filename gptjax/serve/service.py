"""Models that are served, by name, and the parts of a request that all routes share."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from gptjax.inference.engine import Engine
from gptjax.inference.formats import ReplyFormat, reply_format
from gptjax.models.language_model import LanguageModel
from gptjax.models.model import TextEncoder
from gptjax.serve import fields
from gptjax.serve.access import Client, Policy
from gptjax.serve.errors import ApiError
from gptjax.serve.live import LiveReplies
from gptjax.serve.metrics import Metrics
from gptjax.serve.quotas import Quotas

Result = TypeVar("Result")
BODY = 10 * 2**20
"""Maximum bytes of a request's body."""
LARGE = 2**16
"""Bytes of a body beyond which it is not read in the event loop."""
BODY_SECONDS = 30.0
"""Seconds that a client may take for it."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and its engine."""

    model: LanguageModel
    engine: Engine
    tool_format: str | None = None
    """Format of the model's calls of tools, a name of `gptjax.inference.formats.TOOLS`. None: the one that its chat
    template and special tokens tell."""
    adapter: str | None = None
    """Adapter of the engine's that all replies under this name use. None: no adapter."""

    @functools.cached_property
    def format(self) -> ReplyFormat:
        """Format of the model's calls and reasoning."""
        if self.tool_format is None:
            return self.model.reply_format
        template = self.model.template
        return reply_format(None if template is None else template.source, self.model.tokenizer, self.tool_format)


@dataclasses.dataclass(eq=False)
class Service:
    """All models, and the rules for them. A route is a function of it, an HTTP request and a client."""

    models: Mapping[str, Served]
    """By name; the first is the default."""
    policy: Policy = dataclasses.field(default_factory=Policy)
    encoders: Mapping[str, TextEncoder] = dataclasses.field(default_factory=dict)
    """Models that only embed texts, by name."""
    load: Callable[[], tuple[Mapping[str, Served], Mapping[str, TextEncoder]]] | None = None
    """Loads `models` and `encoders` anew. None: they stay."""
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def __post_init__(self):
        rows = sum(
            served.engine.rows + served.engine.queue_limit for served in self.models.values() if not served.adapter
        )
        self.embedding = asyncio.Lock()
        """Held while texts are embedded."""
        self._reloading = asyncio.Lock()
        self._former: set[asyncio.Task[None]] = set()
        self.compiling = asyncio.Lock()
        """For constraints: one at a time, so that slow ones do not take all threads."""
        self.live = LiveReplies(self.policy.filters.outputs)
        self.metrics = Metrics()
        self.draining = False
        """True: the server is stopping, and takes no more requests."""
        self.active = 0
        """Number of requests that are being answered."""
        self.quotas = Quotas(rows, self.policy.queue_tokens, shared=self.policy.keys.shared)

    def end(self, client: Client) -> None:
        """A request has ended: settle what it cost, and note it."""
        for text in client.texts:
            self.metrics.text(client.model, text)
        self.metrics.reply(client.route, client.status)
        if self.policy.audit is not None:
            self.policy.audit.write(**client.record())
        client.at_end.close()

    def close(self) -> None:
        """Stop the engines; what they write ends as cancelled."""
        for served in self.models.values():
            served.engine.close()

    def choose(self, fields: Mapping[str, Any]) -> tuple[str, Served]:
        """The model that a request names. Raises `ApiError` for an unknown one."""
        name = fields.get("model", next(iter(self.models), ""))
        if name not in self.models:
            raise _unknown(name, self.models)
        return name, self.models[name]

    def choose_encoder(self, fields: Mapping[str, Any]) -> tuple[str, TextEncoder, int | None]:
        """The model that embeds for a request, and the maximum number of tokens of a text. Raises `ApiError`."""
        name = fields.get("model", next(iter((*self.encoders, *self.models)), ""))
        if name in self.encoders:
            return name, self.encoders[name], self.encoders[name].config.max_positions
        if name not in self.models:
            raise _unknown(name, (*self.encoders, *self.models))
        if self.models[name].adapter is not None:
            raise ApiError(400, f"model: got the adapter {name}, must be a model of its own to embed", "model")
        return name, self.models[name].model, self.models[name].engine.context

    async def reload(self) -> None:
        """Load the models anew. Running requests end with the former ones, which are closed then. Raises `ApiError`."""
        if self.load is None:
            raise ApiError(501, "this server cannot load its models anew")
        async with self._reloading:
            former = self.models
            self.models, self.encoders = await asyncio.to_thread(self.load)
        task = asyncio.create_task(_retire([served.engine for served in former.values()]))
        self._former.add(task)
        task.add_done_callback(self._former.discard)


async def _retire(engines: Sequence[Engine]) -> None:
    """Close engines once they have nothing to do."""
    await asyncio.sleep(1)  # whoever chose one before has asked it by then
    for engine in engines:
        while engine.active or engine.waiting:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.close)


def _unknown(name: str, known: Iterable[str]) -> ApiError:
    return ApiError(404, f"model: got {name!r}, must be one of {', '.join(known)}", "model", "model_not_found")


async def fields_of(http: HttpRequest, table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a request's body, and the names of unknown ones, as `fields.read`. Raises as that and `body`."""
    value = await body(http)
    return await apart(http, lambda: fields.read(value, table))


async def apart(http: HttpRequest, read: Callable[[], Result]) -> Result:
    """The function's result. For a large body it is called in a thread: others must not wait for it."""
    size = http.headers.get("content-length", "")
    return read() if size.isdecimal() and int(size) <= LARGE else await asyncio.to_thread(read)


async def body(http: HttpRequest) -> dict[str, Any]:
    """The request's JSON object. Raises `ApiError` for anything else."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site may not send unasked
        raise ApiError(415, f"content-type: got {kind or 'none'}, must be application/json")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                data += chunk
                if len(data) > BODY:
                    raise ApiError(413, f"the body has more than {BODY:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} s") from None
    try:
        value = await apart(http, lambda: json.loads(data.decode()))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return value


def require(fields: Mapping[str, Any], name: str) -> None:
    """Raise `ApiError` if this field is not set."""
    if name not in fields:
        raise ApiError(400, f"{name}: got none, must be given", name)
