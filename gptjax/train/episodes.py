"""Episodes: replies that an engine writes to prompts, many at a time, with what tools say between or in them.

Tokens in, tokens out: an episode is the ids that were drawn, and between them the ids of what tools said. Nothing that
was drawn is encoded again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from gptjax.data.chat import Conversation, ConversationTemplate, Message
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Engine, Generation, Request
from gptjax.inference.formats import reply_format
from gptjax.inference.sampling import Sampling
from gptjax.tasks.functions import ChatTools
from gptjax.tasks.task import Reply
from gptjax.tasks.tools import Tool
from gptjax.train.turns import Turns
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Asked:
    """A reply to write."""

    item: int
    """Number of the item in its task."""
    sample: int
    """Number of this reply among those to the item."""
    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    seed: int
    """Seed of the draws, with `sample`: a reply does not depend on the others."""


@dataclasses.dataclass
class Episode:
    """A reply while it is written, and after."""

    asked: Asked
    ids: list[int] = dataclasses.field(default_factory=list)
    """Tokens after the prompt."""
    drawn: list[bool] = dataclasses.field(default_factory=list)
    """True of the tokens that the model drew; False of those of tools."""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Log-probability of each token in the distribution that it was drawn from, or the model's own for a greedy reply;
    0 for those of tools."""
    text: str = ""
    """Text of the reply, without the stop that ended it: answers of tools in it included; after turns that were calls,
    or if it might have been one, the last message, without reasoning."""
    turns: list[Message] = dataclasses.field(default_factory=list)
    """Messages before the last: calls and their results."""
    finished: bool = False
    """True: the model ended it. False: it was cut off at its maximum length. The engine's word."""
    calls: int = 0
    """Number of answers of tools."""
    errors: int = 0
    """Number of those to calls in a conversation that failed or could not be read."""

    @property
    def reply(self) -> Reply:
        """The reply, to be scored."""
        return Reply(self.text, self.finished, tuple(self.turns))


@dataclasses.dataclass(frozen=True)
class Writing:
    """Settings to write replies with."""

    max_tokens: int
    """Maximum number of tokens of a reply, answers of tools included."""
    sampling: Sampling = Sampling()
    """Sampling settings."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, besides the engine's tokens."""
    tools: tuple[Tool, ...] = ()
    """Tools that answer in the middle of a reply."""
    marks: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Special tokens that are part of the text, and their texts."""
    turns: Turns | None = None
    """Calls that end a turn. None: there are none."""

    @classmethod
    def of(
        cls,
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...],
        tools: tuple[Tool, ...] | ChatTools,
        tokenizer: Any,
        template: ConversationTemplate | None,
    ) -> Self:
        """Settings for a model with this chat template. None: it has the format of `gptjax.data.chat`, or none."""
        if isinstance(tools, ChatTools):
            turns = Turns.of(tools, tokenizer, template)
            return cls(max_tokens, sampling, stop, marks=turns.format.marks, turns=turns)
        marks = {} if template is None else reply_format(template.source, tokenizer).marks
        return cls(max_tokens, sampling, stop, tools, marks)

    def check(self, prompt: Conversation) -> None:
        """Raise UserError if the model cannot converse with the tools. prompt: one that offers them."""
        if self.turns is not None:
            self.turns.check(prompt)

    def room(self, episode: Episode, context: int) -> int:
        """Number of tokens that may follow, in a context of so many tokens."""
        return min(self.max_tokens - len(episode.ids), context - len(episode.asked.prompt) - len(episode.ids))

    def request(self, episode: Episode, context: int) -> Request | None:
        """The next part to write, up to a call of a tool or the end. None: there is no room for it."""
        room = self.room(episode, context)
        if room < 1:
            return None
        return Request(
            (*episode.asked.prompt, *episode.ids),
            max_tokens=room,
            sampling=self.sampling,
            seed=episode.asked.seed,
            choice=episode.asked.sample,
            stop=(*self.stop, *(tool.mark for tool in self.tools)),
            marks=self.marks,
            tempered=not self.sampling.greedy,
        )

    def extend(self, episode: Episode, generation: Generation, tokenizer: Tokenizer, context: int) -> bool:
        """Put what was written into the episode, and a tool's answer behind a call. False: the reply has ended, or is
        cut off because the answer does not fit."""
        ids = [token.id for token in generation.tokens]
        if self.turns is not None:
            return self._extend_turns(self.turns, episode, generation, context)
        _put(episode, ids, [token.logprob for token in generation.tokens], drawn=True)
        if generation.finish != "stop":
            episode.text += generation.text
            return False
        if ids[-1] in generation.stream.stop_token_ids or not self.tools:
            episode.text, episode.finished = episode.text + generation.text, True
            return False
        written = b"".join(tokenizer.decode_bytes([token]) for token in ids).decode("utf-8", "replace")  # with the stop
        for tool in self.tools:
            if not written.endswith(tool.mark):  # a token that goes on behind the mark has answered itself
                continue
            answer = tool.answer(episode.text + written)
            episode.text += written
            if answer is not None:
                said = _encode_after(tool.mark, answer, tokenizer)
                if len(said) > self.room(episode, context):
                    return False
                _put(episode, said, [0.0] * len(said), drawn=False)
                episode.text, episode.calls = episode.text + answer, episode.calls + 1
            return True
        if any(written.endswith(stop) for stop in self.stop):
            episode.text, episode.finished = episode.text + generation.text, True
            return False
        episode.text += written
        return True

    def _extend_turns(self, turns: Turns, episode: Episode, generation: Generation, context: int) -> bool:
        """As `extend`, in a conversation with tools."""
        before = (*episode.asked.prompt, *episode.ids)
        _put(episode, [t.id for t in generation.tokens], [t.logprob for t in generation.tokens], drawn=True)
        message = turns.read(before, generation.text)
        episode.text = message.text
        if generation.finish != "stop":
            return False
        by_token = generation.tokens[-1].id in generation.stream.stop_token_ids
        made = sum(turn.role == "assistant" for turn in episode.turns) + 1
        if not by_token or not (message.tool_calls or turns.format.attempts(message.text)):
            episode.finished = True
            return False
        if made == turns.tools.turns:
            return False
        results, errors = turns.results(message, episode.calls)
        said = turns.encode(results)
        if len(said) > self.room(episode, context):
            return False
        _put(episode, said, [0.0] * len(said), drawn=False)
        episode.turns += [message, *results]
        episode.calls, episode.errors = episode.calls + len(results), episode.errors + errors
        return True


def write(engine: Engine, asked: Iterable[Asked], writing: Writing) -> Iterator[Episode]:
    """Episodes in the order in which they end. One whose prompt leaves no room for a reply has no ids.

    The engine must have no thread. Raises UserError, with the item, if it fails."""
    left, active = collections.deque(map(Episode, asked)), list[tuple[Episode, Generation]]()
    while left or active:
        while left and engine.waiting < engine.rows:
            episode = left.popleft()
            if (request := writing.request(episode, engine.context)) is None:
                yield episode
            else:
                active.append((episode, engine.submit(request)))
        engine.run_round()
        ended = [entry for entry in active if entry[1].finish is not None]
        active = [entry for entry in active if entry[1].finish is None]
        for episode, generation in ended:
            if generation.finish == "error":
                raise UserError(f"task: item {episode.asked.item}: the engine failed: {generation.error}")
            goes_on = writing.extend(episode, generation, engine.tokenizer, engine.context)
            request = writing.request(episode, engine.context) if goes_on else None
            if request is None:
                yield episode
            else:
                active.append((episode, engine.submit(request)))


def _encode_after(mark: str, answer: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of an answer behind a mark: some tokenizers put a space before the first word of a text."""
    before, both = tokenizer.encode(mark), tokenizer.encode(mark + answer)
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(answer)


def _put(episode: Episode, ids: list[int], logprobs: list[float], drawn: bool) -> None:
    episode.ids += ids
    episode.logprobs += logprobs
    episode.drawn += [drawn] * len(ids)
