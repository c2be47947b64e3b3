"""Client of a server with OpenAI's interface: `ChatServer("http://localhost:8000", "qwen3").reply(messages)`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from gptjax.io import API_KEY, retry
from gptjax.types import Unavailable, UserError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")


class ServedReply(NamedTuple):
    """A reply of a server."""

    text: str
    finished: bool
    """False: cut off at its maximum length."""


@dataclasses.dataclass(frozen=True)
class ChatServer:
    """A model of a server. The environment's GPTJAX_API_KEY is the key. Raises UserError for a malformed address."""

    url: str
    """Address, with or without /v1."""
    model: str
    """Name of the server's model."""
    seconds: float = 600.0
    """Seconds after which a reply counts as lost."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url: got {self.url!r}, must begin with http:// or https://")
        if not self.model:
            raise UserError("name: got none, must be the name of the server's model")

    def reply(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> ServedReply:
        """Reply to messages, asked for again after transient errors. Raises Unavailable, with the server's words, if
        there is none.

        messages  {"role": ..., "content": ...} of each
        fields    further fields of the request: temperature, max_tokens, seed, ...
        """
        url = self.url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        key = os.environ.get(API_KEY)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        body = {"model": self.model, "messages": [*messages], **fields}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)

        def fetch() -> Any:
            with urllib.request.urlopen(request, timeout=self.seconds) as response:
                return json.load(response)

        try:
            (choice,) = retry.call(fetch, f"reply of {url}")["choices"]
            return ServedReply(choice["message"]["content"] or "", choice["finish_reason"] != "length")
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:300] or str(error)
            raise Unavailable(f"url: got status {error.code} of {url}: {reason}") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            reason = one_line(error)
            raise Unavailable(f"url: got {self.url}, which does not answer as OpenAI's does: {reason}") from None


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item], requests: int) -> Iterator[Result]:
    """Results of a function, as they come, of so many calls at a time. After an error nothing more is called."""
    pool = concurrent.futures.ThreadPoolExecutor(requests)
    try:
        left, waiting = iter(items), set[concurrent.futures.Future[Result]]()
        while True:
            while len(waiting) < 2 * requests:
                try:
                    waiting.add(pool.submit(function, next(left)))
                except StopIteration:
                    break
            if not waiting:
                return
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
