"""Replies of OpenAI's interface, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Generation, Token
from gptjax.serve.errors import ApiError
from gptjax.serve.tools import Taken
from gptjax.types import Json

HEARTBEAT = 10.0
"""Seconds without an event after which a comment is sent, so that nobody on the way takes the connection for dead."""
LOWEST = -9999.0
"""Log-probability in place of minus infinity, which is not JSON."""


class Format:
    """Chunks and objects of one reply. `Chat` and `Completion` are its kinds."""

    kind: str
    chunk: str
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool, alternatives: int):
        self.model, self.tokenizer, self.logprobs, self.alternatives = model, tokenizer, logprobs, alternatives
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, choices: list[Any], chunk: bool, **more: Json) -> dict[str, Any]:
        """A chunk, or the whole reply."""
        head = {"id": self.id, "object": self.chunk if chunk else self.kind, "created": self.created}
        return {**head, "model": self.model, "choices": choices, **more}

    def stream(
        self, texts: Sequence[Generation], prompts: int, include_usage: bool, cancel: Callable[[Generation], None]
    ) -> AsyncIterator[str]:
        """The reply as server-sent events, as `stream` makes them."""
        return stream(self, texts, prompts, include_usage, cancel)

    async def collect(self, texts: Sequence[Generation], prompts: int, n: int) -> dict[str, Any]:
        """The whole reply, as `collect` makes it."""
        return await collect(self, texts, prompts, n)

    def lead(self, text: Generation) -> tuple[str, list[Token]]:
        """Text and tokens before the first piece: none."""
        return "", []

    def piece(self, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool) -> dict[str, Any]:
        """A choice of a chunk."""
        raise NotImplementedError

    def whole(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """A choice of a whole reply."""
        raise NotImplementedError

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token])
        known = None if math.isnan(logprob) else max(logprob, LOWEST)
        return {"token": data.decode("utf-8", "replace"), "logprob": known, "bytes": list(data)}


class Chat(Format):
    """/v1/chat/completions

    taken  takes one choice apart
    """

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool, alternatives: int, taken: Callable[[], Taken]):
        super().__init__(model, tokenizer, logprobs, alternatives)
        self._new, self._taken = taken, dict[int, Taken]()

    def piece(self, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool) -> dict[str, Any]:
        taken = self._taken.setdefault(index, self._new()) if first else self._taken[index]
        delta = taken.delta(text, finish)
        if first:
            delta = {"role": "assistant", "content": "", **delta}
        logprobs = self._logprobs(tokens)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": taken.finish(finish)}

    def whole(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        taken = self._new()
        message = {"role": "assistant", "refusal": None, **taken.message(text)}
        logprobs = self._logprobs(tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": taken.finish(finish)}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**self._token(token.id, token.logprob), "top_logprobs": [self._token(*one) for one in token.alternatives]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class Completion(Format):
    """/v1/completions"""

    kind = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool, alternatives: int, echo: bool):
        super().__init__(model, tokenizer, logprobs, alternatives)
        self.echo = echo

    def lead(self, text: Generation) -> tuple[str, list[Token]]:
        """The prompt, if it is to be repeated."""
        if not self.echo:
            return "", []
        return self.tokenizer.decode(text.request.prompt), text.prompt

    def piece(self, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool) -> dict[str, Any]:
        return self.whole(index, text, tokens, finish)

    def whole(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        shown = [self._token(token.id, token.logprob) for token in tokens]

        def likely(token: Token) -> dict[str, float] | None:
            """None: of a prompt's first token. Parts of characters may be shown alike; then the likeliest counts."""
            pairs = [self._token(*pair) for pair in reversed(token.alternatives)]
            return None if math.isnan(token.logprob) else {one["token"]: one["logprob"] for one in pairs}

        return {
            "tokens": [one["token"] for one in shown],
            "token_logprobs": [one["logprob"] for one in shown],
            "top_logprobs": [likely(token) for token in tokens] if self.alternatives else None,
        }


async def changes(texts: Sequence[Generation]) -> AsyncIterator[tuple[int, str, list[Token], str | None] | None]:
    """Every new piece of these texts: (number of the text, piece, its tokens, reason for the end or None). None:
    nothing happened for a while. Raises `ApiError` if the engine breaks."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have ended before the text
            loop.call_soon_threadsafe(changed.set)

    for text in texts:
        text.listen(wake)
    shown, counted, open_texts = [0] * len(texts), [0] * len(texts), set(range(len(texts)))
    while open_texts:
        try:
            await asyncio.wait_for(changed.wait(), HEARTBEAT)
        except TimeoutError:
            yield None
            continue
        changed.clear()
        for i in sorted(open_texts):
            text, tokens, finish = texts[i].snapshot()
            if finish in ("error", "cancelled"):
                reason = texts[i].error
                status = 500 if finish == "error" else 503 if reason is None else 504
                raise ApiError(status, reason or "the server is stopping")
            if finish is None and len(text) == shown[i]:
                continue
            yield i, text[shown[i] :], tokens[counted[i] :], finish
            shown[i], counted[i] = len(text), len(tokens)
            if finish is not None:
                open_texts.remove(i)


def usage(texts: Sequence[Generation], prompts: int) -> dict[str, Any]:
    """Numbers of tokens; `prompts` different ones, each with as many choices."""
    each = len(texts) // prompts
    read = sum(len(text.request.prompt) for text in texts[::each])
    written, reused = sum(len(text.tokens) for text in texts), sum(text.reused for text in texts[::each])
    details = {"prompt_tokens_details": {"cached_tokens": reused}}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}


async def stream(
    form: Format, texts: Sequence[Generation], prompts: int, include_usage: bool, cancel: Callable[[Generation], None]
) -> AsyncIterator[str]:
    """Server-sent events. cancel: called with each text when the client is gone or all is said."""
    more = {"usage": None} if include_usage else {}
    started = [False] * len(texts)
    try:
        async for change in changes(texts):
            if change is None:
                yield ": waiting\n\n"
                continue
            i, piece, tokens, finish = change
            if not started[i]:
                before, earlier = form.lead(texts[i])
                piece, tokens = before + piece, [*earlier, *tokens]
            choice = form.piece(i, piece, tokens, finish, not started[i])
            started[i] = True
            yield _event(form.envelope([choice], True, **more))
        if include_usage:
            yield _event(form.envelope([], True, usage=usage(texts, prompts)))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    finally:
        for text in texts:
            cancel(text)


async def collect(form: Format, texts: Sequence[Generation], prompts: int, n: int) -> dict[str, Any]:
    """The whole reply, with the `n` best choices for each prompt: those with the highest mean log-probability."""
    async for _ in changes(texts):
        pass
    each = len(texts) // prompts
    groups = [texts[i : i + each] for i in range(0, len(texts), each)]
    chosen = [text for group in groups for text in (sorted(group, key=_mean, reverse=True)[:n] if n < each else group)]
    choices = []
    for i, generation in enumerate(chosen):
        (before, earlier), (text, tokens, finish) = form.lead(generation), generation.snapshot()
        choices.append(form.whole(i, before + text, [*earlier, *tokens], finish))
    return form.envelope(choices, False, usage=usage(texts, prompts))


def _mean(text: Generation) -> float:
    return sum(max(token.logprob, LOWEST) for token in text.tokens) / max(len(text.tokens), 1)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
