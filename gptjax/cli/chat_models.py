"""Models to chat with: one of this machine, over the engine, or those of a running server."""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gptjax.cli.chat import note
from gptjax.types import UserError

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.data.chat import Message
    from gptjax.inference.engine import Engine
    from gptjax.inference.formats import Reader
    from gptjax.models.language_model import LanguageModel

CONTEXT = 8_192
"""Maximum number of tokens of a conversation, unless more are asked for: memory for all is taken at once."""
SECONDS = 60.0
"""Seconds without a word from the server after which the connection counts as lost."""
Reply = tuple[int, Generator[str, None, Any]]
"""The number of messages that did not fit, the oldest ones, and the pieces of the reply. Closing them stops it."""


class ChatModel(Protocol):
    """A model, or several of which one is chosen."""

    name: str

    def names(self) -> list[str]:
        """Models to choose from, as far as they are known."""
        ...

    def choose(self, name: str) -> None:
        """Talk with another model from now on. Raises UserError."""
        ...

    def reply(self, messages: Sequence[Message], options: dict[str, Any]) -> Reply:
        """The next message. Raises UserError, also while the pieces are read.

        options  of `gptjax.cli.main.SamplingOptions`, and `template`: variables of the chat template
        """
        ...


class LocalModel:
    """A model of this machine, over the engine, which reads only what is new in a conversation.

    load     of a path. Raises UserError
    context  maximum number of tokens of a conversation. None: the model's, at most `CONTEXT`
    """

    def __init__(self, path: Path, load: Callable[[Path], LanguageModel], context: int | None = None):
        self._load, self._context = load, context
        self._engine: Engine | None = None
        self.choose(str(path))

    def names(self) -> list[str]:
        return [self.name]

    def choose(self, name: str) -> None:
        model, context = self._load(Path(name)), self._context or CONTEXT
        model = dataclasses.replace(model, context=min(context, model.context or context))
        engine = model.engine(rows=1)
        if self._engine is not None:
            self._engine.close()
        self._model, self.name, self._engine = model, name, engine
        engine.start()

    def reply(self, messages: Sequence[Message], options: dict[str, Any]) -> Reply:
        kept, left_out = self._model.trim(messages, options["max_tokens"], options["template"])
        return left_out, self._write(kept, **options)

    def _write(
        self,
        messages: Sequence[Message],
        template: dict[str, Any],
        max_tokens: int | None,
        seed: int,
        stop: Sequence[str],
        **sampling: Any,
    ) -> Generator[str, None, None]:
        from gptjax.inference.engine import Request
        from gptjax.inference.generate import DEFAULT_TOKENS
        from gptjax.inference.sampling import Sampling

        engine, form = self._engine, self._model.reply_format
        assert engine is not None, "`choose` starts one"
        ids = tuple(self._model.encode_chat(messages, template))
        reader = form.reader(False, form.thinking(ids, self._model.tokenizer))
        request = Request(
            ids,
            min(max_tokens or DEFAULT_TOKENS, engine.context - len(ids)),
            dataclasses.replace(self._model.sampling or Sampling(), **sampling),
            seed % 2**32,
            stop=tuple(stop),
            marks=form.marks,
        )
        text = engine.submit(request)
        try:
            yield from _content(_taken(reader, text))
        finally:
            engine.cancel(text)
        if text.error is not None:
            raise UserError(f"engine: {text.error}")


class ServedModels:
    """The models of a server with OpenAI's interface, such as `gptjax serve`.

    url   as http://127.0.0.1:8000, with or without /v1
    name  of a model. None: the first
    key   API key, or None
    """

    def __init__(self, url: str, name: str | None = None, key: str | None = None):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url: got {url!r}, must begin with http:// or https://")
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.name = ""
        self.choose(name or self.names()[0])

    def names(self) -> list[str]:
        with self._ask("/models") as response:
            return [model["id"] for model in json.load(response)["data"]]

    def choose(self, name: str) -> None:
        names = self.names()
        if name not in names:
            raise UserError(f"model: got {name}, must be one of {', '.join(names)}")
        self.name = name

    def reply(self, messages: Sequence[Message], options: dict[str, Any]) -> Reply:
        kept, left_out = list(messages), 0
        while True:
            try:
                response = self._ask("/chat/completions", self._body(kept, options))
                return left_out, _pieces(response)
            except _TooLong:
                shorter = _drop_half(kept)
                if len(shorter) == len(kept):
                    raise
                left_out, kept = left_out + len(kept) - len(shorter), shorter

    def _body(self, messages: Sequence[Message], options: dict[str, Any]) -> dict[str, Any]:
        fields = {name: value for name, value in options.items() if name != "template" and value not in (None, ())}
        if options["template"]:
            fields["chat_template_kwargs"] = options["template"]
        said = [{"role": message.role, "content": message.content} for message in messages]
        return {"model": self.name, "messages": said, "stream": True, **fields}

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            try:
                said = json.load(error)["error"]
                message, code = str(said["message"]), said.get("code")
            except (ValueError, LookupError, TypeError, AttributeError):
                message, code = f"url: got status {error.code} of {self._url}{path}", None
            raise (_TooLong if code == "context_length_exceeded" else UserError)(message) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"url: got {self._url}, which does not answer: {reason}") from None


class _TooLong(UserError):
    """The messages do not fit the model's context."""


def _drop_half(messages: Sequence[Message]) -> list[Message]:
    """The messages without the older half of the turns; system messages and the last turn are kept."""
    system = [message for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    starts = [i for i, message in enumerate(turns) if message.role == "user"]
    return [*system, *(turns[starts[len(starts) // 2] :] if len(starts) > 1 else turns)]


def _taken(reader: Reader, pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Text and reasoning of each piece."""
    for piece in pieces:
        delta = reader.feed(piece)
        yield delta.content, delta.reasoning
    delta = reader.close()
    yield delta.content, delta.reasoning


def _pieces(response: Any) -> Generator[str, None, None]:
    """Text of a stream of chunks."""
    with response:
        yield from _content(_deltas(response))


def _content(deltas: Iterable[tuple[str, str]]) -> Generator[str, None, None]:
    """The texts of (text, reasoning). The reasoning is announced and not shown."""
    thinking = False
    for content, reasoning in deltas:
        if reasoning and not thinking:
            thinking = True
            note("thinking")
        if content:
            yield content


def _deltas(response: Any) -> Iterator[tuple[str, str]]:
    for event in _events(response):
        if "error" in event:
            raise UserError(str(event["error"].get("message")))
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            yield delta.get("content") or "", delta.get("reasoning_content") or ""


def _events(response: Any) -> Iterator[dict[str, Any]]:
    try:
        for line in response:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
    except (OSError, ValueError) as error:
        raise UserError(f"url: the connection was lost: {error}") from None
    raise UserError("url: the connection was lost before the end of the reply")
