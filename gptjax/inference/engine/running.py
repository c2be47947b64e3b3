"""Texts that have a row of the engine, and calls of its device that are under way."""

from __future__ import annotations

import dataclasses

import numpy as np

from gptjax.inference.engine.device import Chunk, token_set
from gptjax.inference.engine.drawn import Drawn
from gptjax.inference.engine.pages import Chain
from gptjax.inference.engine.request import Generation, Token
from gptjax.types import UserError


@dataclasses.dataclass(eq=False)
class Running:
    """A text, its row and its pages."""

    generation: Generation
    row: int
    adapter: int
    """Number of its adapter, or 0."""
    chains: list[Chain]
    """Chains of the pages of its prompt, without the last token; it may not fill the last page."""
    pages: list[int]
    read: int
    """Number of tokens of the prompt in the cache, once all calls have ended."""
    replay: list[int]
    """Its tokens from before it gave up its pages."""
    length: int = 0
    """Maximum number of tokens in the cache, once all calls have ended. They may write fewer only with speculation."""
    written: int = 0
    """Number of tokens of the text whose calls were looked at."""
    scored: int = 1
    """Number of tokens of the prompt whose log-probabilities were looked at, if they are wanted."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.generation.request.prompt

    @property
    def reading(self) -> bool:
        """True: the prompt is not in the cache yet. Its last token is the first input of `decode`."""
        return self.read < len(self.prompt) - 1

    @property
    def limit(self) -> int:
        """Number of tokens in the cache at its end."""
        return len(self.prompt) - 1 + self.generation.request.max_tokens

    def next_chunks(self, most: int, size: int, page: int) -> list[Chunk]:
        """The next chunks of the prompt, at most so many of `size` tokens and up to the end of a page: read now."""
        start, end = self.read, min(len(self.prompt) - 1, self.read // page * page + page, self.read + most * size)
        self.read = end
        return [
            Chunk(self.prompt[i : min(i + size, end)], i, self.pages, self.adapter) for i in range(start, end, size)
        ]

    def ready(self, most: int, guesses: bool) -> int:
        """Number of tokens, at most `most`, that can be decoded now.

        guesses: a call may write fewer, so that tokens to replay are known only when none is under way."""
        count = 0 if self.reading else min(most, self.limit - self.length)
        if guesses and self.written < len(self.replay) and self.length > len(self.prompt) - 1 + self.written:
            return 0
        if self.generation.matcher is None:
            return count
        return min(count, len(self.prompt) + len(self.generation.tokens) - self.length)

    def allowed(self, count: int, vocab: int) -> np.ndarray | None:
        """Set of the tokens that may be drawn, by a call that ends after `count` tokens of the text. None: all. Raises
        UserError if there is none, and what the constraint raises."""
        matcher, stream = self.generation.matcher, self.generation.stream
        if matcher is None or count <= len(self.generation.tokens):
            return None
        allowed = np.zeros(-(-vocab // 32), np.uint32)
        matcher.fill(allowed)
        ends = token_set(stream.stop_token_ids, vocab)
        may_end = matcher.accepting and count > self.generation.request.min_tokens
        allowed = (allowed & ~ends) | (ends if may_end else 0)
        if not allowed.any():
            raise UserError("allows no token here")
        return allowed


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `decode` or `score` whose tokens were not looked at."""

    drawn: Drawn
    texts: list[tuple[Running, int]]
    """Each with the maximum number of its tokens."""
    steps: int = 0
    """Number of passes. 0: a call of `score`."""


def tokens_of(drawn: Drawn, row: int, places: range, alternatives: int) -> list[Token]:
    """These tokens of a row, each with so many of the most likely ones."""
    made = []
    for i in places:
        likely, logprobs = drawn.likely[row, i, :alternatives].tolist(), drawn.likely_logprobs[row, i].tolist()
        pairs = tuple(zip(likely, logprobs, strict=False))
        made.append(Token(int(drawn.tokens[row, i]), float(drawn.logprobs[row, i]), pairs))
    return made
