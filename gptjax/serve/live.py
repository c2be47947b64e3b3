"""Replies of the page that live on the server: they go on without a reader, and are read again from any event.

    reply = live.start(client, engine, request, charge, reader)
    async for event in reply.read(start=0): ...

Events are JSON objects, in the order of their numbers:

    {"text": "Hel", "tokens": [["Hel", 0.9, [["Hel", 0.9], ["Y", 0.1]]]]}   text, and tokens with their probabilities
    {"text": "", "thought": "The user ...", "tokens": [...]}                reasoning
    {"html": "<p>Hello.</p>", "rest": "* o"}                                a finished block, and the text after it
    {"finish": "stop", "usage": {...}, "first": 0.1, "seconds": 1.5}        the end: stop, length or cancelled; first:
                                                                            seconds to the first token
    {"error": "the engine ..."}                                             the end, instead
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from gptjax.inference.engine import Engine, Generation, Request, Token
from gptjax.inference.formats import Delta, Reader
from gptjax.serve import replies
from gptjax.serve.errors import ApiError
from gptjax.serve.filters import Filter, attach
from gptjax.serve.markdown import blocks
from gptjax.serve.quotas import Charge

COUNT, BYTES, AGE = 100, 64 * 2**20, 3_600.0
"""Bounds of the finished replies that are kept: number for each client, bytes in all, seconds since their end."""


class LiveReply:
    """A reply while it is written and for a while after. All methods are the event loop's."""

    def __init__(
        self,
        client: str,
        engine: Engine,
        request: Request,
        charge: Charge,
        reader: Reader,
        prefix: str,
        filters: Sequence[Filter],
    ):
        self.id, self.client, self.engine, self._charge = secrets.token_urlsafe(16), client, engine, charge
        self.generation: Generation = engine.submit(request)
        attach(self.generation, filters, engine.cancel)
        self._reader, self._shows_tokens = reader, not filters  # which tokens would pass by
        self.started, self.ended = time.monotonic(), math.inf
        self.size = 0
        """Bytes of its events."""
        self._events: list[str] = []
        self._changed = asyncio.Condition()
        self._blocks, self._stopped = blocks(), False
        self.at_end: Callable[[], None] = lambda: None
        """Called when it has ended."""
        self._task = asyncio.create_task(self._write(prefix))

    def stop(self) -> None:
        """End the text here."""
        self._stopped = True
        self.engine.cancel(self.generation)

    async def read(self, start: int) -> AsyncIterator[tuple[int, str] | None]:
        """Events from number `start` on, each with the number of the next. None: nothing happened for a while."""
        while True:
            while start < len(self._events):
                start += 1
                yield start, self._events[start - 1]
            if self.ended < math.inf:
                return
            try:
                async with asyncio.timeout(replies.HEARTBEAT), self._changed:
                    await self._changed.wait_for(lambda seen=start: seen < len(self._events) or self.ended < math.inf)
            except TimeoutError:
                yield None

    async def _write(self, prefix: str) -> None:
        """Make events of what the engine writes."""
        end: dict[str, Any] = {"error": "the server is stopping"}
        shown = counted = 0
        first = None
        try:
            await self._add(Delta(prefix), [])
            with contextlib.suppress(ApiError):  # the text's own end says why
                async for change in replies.changes([self.generation]):
                    if change is None:
                        continue
                    _, piece, tokens, finish = change
                    first = first or self._seconds()
                    await self._add(self._taken(piece, finish is not None), tokens, finish is not None)
                    shown, counted = shown + len(piece), counted + len(tokens)
            text, tokens, finish = self.generation.snapshot()
            if finish in ("cancelled", "error"):
                await self._add(self._taken(text[shown:], True), tokens[counted:], True)
            usage, seconds = replies.usage([self.generation], 1), self._seconds()
            end = {"finish": finish, "usage": usage, "first": first or seconds, "seconds": seconds}
            if self.generation.error or (finish == "cancelled" and not self._stopped):
                end = {"error": self.generation.error or "the server is stopping"}
        finally:
            self.stop()
            self._charge.settle(len(self.generation.request.prompt) + len(self.generation.tokens))
            self.ended = time.monotonic()
            self.at_end()
            self._append(end)
            async with self._changed:
                self._changed.notify_all()

    def _taken(self, text: str, last: bool) -> Delta:
        """The next part of the reply, taken apart."""
        parts = [self._reader.feed(text), *([self._reader.close()] if last else [])]
        return Delta("".join(part.content for part in parts), "".join(part.reasoning for part in parts))

    async def _add(self, delta: Delta, tokens: Sequence[Token], last: bool = False) -> None:
        """Append text, and the blocks that it finished."""
        text, decode = delta.content, self.engine.tokenizer.decode_bytes
        if delta or tokens:
            thought = {"thought": delta.reasoning} if delta.reasoning else {}
            shown = [_shown(token, decode) for token in tokens if self._shows_tokens]
            self._append({"text": text, **thought, "tokens": shown})
        slow = last or "\n" in text
        done = await asyncio.to_thread(self._blocks.feed, text, last) if slow else self._blocks.feed(text)
        for i, html in enumerate(done):
            self._append({"html": html, "rest": self._blocks.rest if i == len(done) - 1 else ""})
        async with self._changed:
            self._changed.notify_all()

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def _append(self, event: dict[str, Any]) -> None:
        data = json.dumps(event, ensure_ascii=False, allow_nan=False)
        data = data.encode("utf-8", "replace").decode()
        self._events.append(data)
        self.size += len(data.encode()) + 64


class LiveReplies:
    """The replies of all clients, by id."""

    def __init__(self, filters: Sequence[Filter] = ()) -> None:
        """filters: those of the replies."""
        self._filters = filters
        self._replies: dict[str, LiveReply] = {}

    @property
    def running(self) -> int:
        """Number of replies that are being written, whether anybody reads them or not."""
        return sum(reply.ended == math.inf for reply in self._replies.values())

    def start(
        self, client: str, engine: Engine, request: Request, charge: Charge, reader: Reader, prefix: str = ""
    ) -> LiveReply:
        """Begin a reply. Raises UserError as `Engine.submit` does.

        client  digest of the key whose alone it is
        charge  settled at its end
        reader  takes it apart
        prefix  text that it continues, shown before it
        """
        try:
            reply = LiveReply(client, engine, request, charge, reader, prefix, self._filters)
        except Exception:
            charge.settle(0)
            raise
        self._forget_old(client)
        self._replies[reply.id] = reply
        return reply

    def find(self, identity: str, client: str) -> LiveReply:
        """A client's own reply. Raises `ApiError` for one that is unknown, forgotten or another's."""
        self._forget_old(client)
        reply = self._replies.get(identity)
        if reply is None or reply.client != client:
            raise ApiError(404, "the reply is no longer here")
        return reply

    def forget(self, reply: LiveReply) -> None:
        """Stop a reply and remove it."""
        reply.stop()
        self._replies.pop(reply.id, None)

    def _forget_old(self, client: str) -> None:
        """Remove finished replies that are out of bounds, the first that ended first."""
        finished = sorted((r for r in self._replies.values() if r.ended < math.inf), key=lambda r: r.ended)
        mine = [reply for reply in finished if reply.client == client]
        size, now = sum(reply.size for reply in finished), time.monotonic()
        for reply in finished:
            too_many = reply in mine[: max(0, len(mine) - COUNT)]
            if too_many or size > BYTES or now - reply.ended > AGE:
                del self._replies[reply.id]
                size -= reply.size


def _shown(token: Token, decode: Any) -> list[Any]:
    """[text, probability, [[text, probability] of the likely ones]]"""

    def pair(identity: int, logprob: float) -> list[Any]:
        return [decode([identity]).decode("utf-8", "replace"), round(math.exp(min(logprob, 0.0)), 4)]

    return [*pair(token.id, token.logprob), [pair(*one) for one in token.alternatives]]
