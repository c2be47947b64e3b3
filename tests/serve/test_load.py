"""The service under load: every reply is the one that its request gets alone, whoever else comes, leaves or is slow."""

import asyncio
import json
import random
import resource
import time

import httpx
import pytest
from test_serve import TALK, Server

CLIENTS, SECONDS = 200, 30


def body(kind: int) -> dict:
    """One of 20 requests, of all lengths."""
    talk = [*TALK, {"role": "assistant", "content": "a" * (kind * 5)}, {"role": "user", "content": f"And {kind}?"}]
    return {"messages": talk, "seed": kind, "max_tokens": 5 + kind, "temperature": kind % 3 * 0.6, "stream": True}


async def read(reply: httpx.Response, leave_after: int | None = None, slow: float = 0.0) -> str | None:
    """The text of a stream. None: left before its end."""
    text = ""
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            return text
        if line.startswith("data: "):
            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            await asyncio.sleep(slow)
        if leave_after is not None and len(text) >= leave_after:
            return None
    raise AssertionError("a stream without an end")


@pytest.mark.slow
def test_two_hundred_clients_get_what_each_gets_alone():
    server = Server(queue=150)
    counts = {"whole": 0, "left": 0, "busy": 0}

    async def client(number: int, http: httpx.AsyncClient, expected: list[str], until: float) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            kind = draw.randrange(20)
            leave = draw.randrange(4) if draw.random() < 0.2 else None
            async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body(kind)) as reply:
                if reply.status_code == 429:
                    counts["busy"] += 1
                    await asyncio.sleep(0.2)
                    continue
                assert reply.status_code == 200
                text = await read(reply, leave, 0.02 if number % 10 == 0 else 0.0)
            counts["left" if text is None else "whole"] += 1
            assert text in (None, expected[kind]), f"request {kind} was answered as another"

    async def everyone() -> None:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            expected = []
            for kind in range(20):
                async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body(kind)) as reply:
                    expected.append(await read(reply))
            until = time.monotonic() + SECONDS
            await asyncio.gather(*(client(number, http, expected, until) for number in range(CLIENTS)))

    try:
        asyncio.run(everyone())
        assert counts["whole"] > 200, counts
        assert counts["left"] > 0, counts
        assert counts["busy"] > 0, counts
        assert httpx.get(f"{server.url}/health").status_code == 200
        deadline = time.monotonic() + 20
        while server.engine.active or server.engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.engine.pages.check()
        assert server.engine.pages.free == server.engine.pages.count
        used = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(2)
        idle = resource.getrusage(resource.RUSAGE_SELF)
        assert idle.ru_utime + idle.ru_stime - used.ru_utime - used.ru_stime < 0.4, "an idle service is idle"
    finally:
        server.close()
