"""A request to the engine, and the text that comes of it."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.constraints.constraint import Constraint
from gptjax.inference.engine.drawn import ALTERNATIVES
from gptjax.inference.sampling import Sampling
from gptjax.inference.text import TextStream
from gptjax.types import UserError

Finish = Literal["stop", "length", "cancelled", "error", "content_filter"]
"""Reason for the end of a text; "content_filter" is a `View`'s."""
View = Callable[[str, Finish | None], tuple[str, Finish | None]]
"""Function of the text that can be shown so far and the reason for its end -> both as readers see them. Called with
longer and longer texts, it returns longer and longer ones."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int = 256
    """Maximum number of tokens to write."""
    sampling: Sampling = Sampling()
    """Sampling settings."""
    seed: int = 0
    """Seed of the draws, 0 to 2^32 - 1."""
    choice: int = 0
    """Number of this text among several for the same prompt and seed; each has its own draws."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are not part of it."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end the text. None: the engine's."""
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Token -> addition to its logit."""
    alternatives: int = 0
    """Number of most likely tokens to return with each token, at most `drawn.ALTERNATIVES`."""
    min_tokens: int = 0
    """Number of tokens before one may be drawn that ends the text. A stop string, or a constraint that allows nothing
    more, ends it all the same."""
    constraint: Constraint | None = None
    """Texts that are allowed; see `Engine.constraint`. The text ends where nothing more is."""
    marks: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Special tokens that are part of the text, and their texts."""
    prompt_logprobs: bool = False
    """Return the log-probabilities of the prompt's tokens too. Then all of the prompt is read anew."""
    tempered: bool = False
    """Log-probabilities of the text's tokens are those after the temperature: of the distribution that tokens are drawn
    from, if nothing but the temperature changes it."""
    adapter: str | None = None
    """Name of an adapter of the engine's. None: the model without one."""
    priority: int = 0
    """Higher ones go first."""
    client: str = ""
    """Whom it is for: clients wait fairly, and share prefixes with themselves alone."""

    def check(self, vocab: int, drawn: int, context: int) -> None:
        """Raise UserError if a model of `vocab` tokens, of which the first `drawn` can be written, cannot do this in a
        context of so many tokens."""
        length, p = len(self.prompt), self.prompt
        if not length:
            raise UserError("prompt: got no tokens, must have at least one")
        if not 0 <= min(p) <= max(p) < vocab:
            raise UserError(f"prompt: got tokens {min(p)} to {max(p)}, must be 0 to {vocab - 1} for this model")
        least = 0 if self.prompt_logprobs else 1
        if self.max_tokens < least:
            raise UserError(f"max_tokens: got {self.max_tokens}, must be at least {least}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UserError(f"min_tokens: got {self.min_tokens}, must be 0 to max_tokens, {self.max_tokens}")
        if length + self.max_tokens > context:
            raise UserError(
                f"max_tokens: got {self.max_tokens} after a prompt of {length} tokens, must be at most "
                f"{max(context - length, 0)}: the context is {context} tokens; shorten the prompt or the answer"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: got {self.seed}, must be 0 to {2**32 - 1}")
        if self.tempered and self.sampling.greedy:
            raise UserError("temperature: got 0, must be above 0 for log-probabilities after the temperature")
        if not 0 <= self.alternatives <= ALTERNATIVES:
            raise UserError(f"alternatives: got {self.alternatives}, must be 0 to {ALTERNATIVES}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop: got {self.stop!r}, must be a sequence of strings, none of them empty")
        for token, value in self.bias.items():
            if not (0 <= token < drawn and math.isfinite(value)):
                raise UserError(f"bias: got {token}: {value}, must be finite numbers of tokens 0 to {drawn - 1}")


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text."""

    id: int
    logprob: float
    """Log-probability in nats under the model itself: before bias, penalties, filters and, unless the request is
    `tempered`, temperature. Of a prompt's first token: NaN."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities."""


class Generation:
    """A text while the engine writes it. Safe to use from any thread.

    for piece in generation:          # as it is written
        print(piece, end="")
    generation.text, generation.finish
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, stop_token_ids: tuple[int, ...] | None):
        ends = request.stop_token_ids if request.stop_token_ids is not None else stop_token_ids
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self.request = request
        self.stream = TextStream(tokenizer, request.max_tokens, request.stop, ends, request.marks)
        self.matcher = None if request.constraint is None else request.constraint.start()
        """State of the constraint after `tokens`; for the engine."""
        self.tokens: list[Token] = []
        self.prompt: list[Token] = []
        """Tokens of the prompt that have their log-probabilities, if those were asked for."""
        self.finish: Finish | None = None
        self.error: str | None = None
        """The engine's error if it broke, or the reason why the text was cancelled."""
        self.reused = 0
        """Number of tokens of the prompt that were read from pages of earlier ones."""
        self.asked = time.monotonic()
        """Time of the request, in seconds of `time.monotonic`."""
        self.began: float | None = None
        """Time when it was given a row. None: it waits, as for the first token and the end."""
        self.first: float | None = None
        self.ended: float | None = None
        self.view: View | None = None
        """Changes what `snapshot` shows. The tokens are not shown then."""
        if request.prompt_logprobs:
            self.extend_prompt([Token(request.prompt[0], math.nan)], 0)

    @property
    def text(self) -> str:
        """The part that can be shown: no later token changes it."""
        return self.stream.safe if self.finish in (None, "cancelled", "error") else self.stream.text

    def snapshot(self) -> tuple[str, list[Token], Finish | None]:
        """The text that can be shown, its tokens so far and the reason for its end, all of one moment."""
        with self._changed:
            if self.view is None:
                return self.text, list(self.tokens), self.finish
            text, finish = self.view(self.text, self.finish)
            return text, [], finish

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end. False: it has not come."""
        with self._changed:
            return self._changed.wait_for(lambda: self.finish is not None, timeout)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this after every change, from the engine's thread, and once now."""
        with self._changed:
            self._listeners.append(listener)
        listener()

    def __iter__(self) -> Iterator[str]:
        """Pieces of the text; ends with it."""
        shown = ""
        while True:
            with self._changed:
                while self.finish is None and len(self.text) == len(shown):
                    self._changed.wait()
                ended, text = self.finish is not None, self.text
            if len(text) > len(shown):
                yield text[len(shown) :]
            if ended:
                return
            shown = text

    def extend_prompt(self, tokens: list[Token], first: int) -> None:
        """Put tokens of the prompt at place `first`; for the engine."""
        with self._changed:
            self.prompt[first:] = tokens
            if not self.request.max_tokens and len(self.prompt) == len(self.request.prompt):
                self.finish = "length"
        self._notify()

    def extend(self, tokens: list[Token]) -> None:
        """Append tokens; for the engine. Raises what the constraint raises."""
        with self._changed:
            for token in tokens:
                if self.stream.finish is None:
                    self.stream.extend([token.id], [token.logprob])
                    self.tokens.append(token)
                    if self.matcher is not None and token.id not in self.stream.stop_token_ids:
                        self.matcher.accept(token.id)
                        if self.matcher.finished:
                            self.stream.finish = "stop"
            self.finish = self.stream.finish
        self._notify()

    def end(self, finish: Finish, error: str | None = None) -> None:
        """End the text; for the engine."""
        with self._changed:
            if self.finish is None:
                self.finish, self.error = finish, error or self.error
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            if self.first is None and self.tokens:
                self.first = time.monotonic()
            if self.ended is None and self.finish is not None:
                self.ended = time.monotonic()
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


class Busy(UserError):
    """Too many requests wait."""
