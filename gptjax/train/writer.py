"""Writer of rollouts: an engine, and processes that score what it writes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, cast

import jax
import numpy as np

from gptjax.data.chat import Message, conversation
from gptjax.distributed import processes
from gptjax.inference.engine import Engine
from gptjax.protocols import Tokenizer
from gptjax.tasks.scorers import Scorers
from gptjax.tasks.task import Reply, Score
from gptjax.train.episodes import Asked, Episode, write
from gptjax.types import Params, UserError

if TYPE_CHECKING:
    from gptjax.train.rollouts import Rollouts
    from gptjax.train.rounds import Policy

PROBES = 4
"""Number of items whose right and empty replies are scored before the first step."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A reply and its score."""

    episode: Episode
    score: Score

    def record(self, step: int) -> dict[str, Any]:
        """The reply, of JSON types. step: of the policy that wrote it."""
        asked, score = self.episode.asked, self.score
        return {
            "step": step,
            "item": asked.item,
            "sample": asked.sample,
            **({"turns": turns} if (turns := [turn.as_json() for turn in self.episode.turns]) else {}),
            "reply": self.episode.text,
            "tokens": len(self.episode.ids),
            "finished": self.episode.finished,
            "reward": score.value,
            "outcome": score.outcome,
            "status": score.status,
        }

    def as_json(self) -> dict[str, Any]:
        """All of it, of JSON types but for the prompt."""
        asked = {"item": self.episode.asked.item, "sample": self.episode.asked.sample, "seed": self.episode.asked.seed}
        written = {name: value for name, value in vars(self.episode).items() if name != "asked"}
        written["turns"] = [turn.as_json() for turn in self.episode.turns]
        return {"asked": asked, "episode": written, "score": dataclasses.asdict(self.score)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], prompts: Mapping[int, tuple[int, ...]]) -> Self:
        """The reply that `as_json` returned."""
        asked = Asked(prompt=prompts[data["asked"]["item"]], **data["asked"])
        written = {**data["episode"], "turns": [*conversation(data["episode"]["turns"])]}
        return cls(Episode(asked, **written), Score(**data["score"]))


@dataclasses.dataclass(frozen=True)
class Share:
    """Replies that this process has written of those asked for."""

    replies: list[Scored] | None
    """None: a stop was asked for."""
    seconds: float = 0.0
    """Duration of writing and scoring."""
    error: Exception | None = None
    """Error to be raised by all processes."""

    def as_json(self) -> list[dict[str, Any]] | None:
        """The replies, of JSON types. Raises the error."""
        if self.error is not None:
            raise self.error
        return None if self.replies is None else [scored.as_json() for scored in self.replies]


class Writer:
    """An engine, and processes that score what it writes: in each process of a job, for its share of the replies. Safe
    to use from two threads, one after the other."""

    def __init__(self, data: Rollouts, tokenizer: Tokenizer):
        self._data, self._tokenizer = data, tokenizer
        self._writing = data.writing(tokenizer)
        self._scorers = Scorers(data.task, data.workers, data.timeout)
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def probe(self, items: Sequence[int]) -> None:
        """Score right and empty replies. A collective call. Raises UserError if all rewards are the same, or one is not
        a number, and if the model cannot converse with the tools."""
        task = self._data.task
        self._writing.check(self._data.messages(items[0]))
        replies = [(i, Reply(text)) for i in items[:PROBES] for text in (task.example(i)[-1].text, "")]
        futures = [self._scorers.submit(i, reply) for i, reply in replies]
        found = processes.on_each(lambda: [dataclasses.asdict(score) for score in self._scores(replies, futures)])
        scores = self._rewarded(replies, [Score(**score) for score in found[0]], collective=True)
        rewards = {score.value for score in scores}
        if len(rewards) == 1:
            reward = rewards.pop()
            raise UserError(
                f"task: got one reward for right and for empty replies to {task.name}, {reward:g}, must tell them apart"
            )

    def write(self, policy: Policy, asked: Sequence[Asked], stopped: Callable[[], bool]) -> list[Scored] | None:
        """Replies of the policy, in the order of `asked`. A collective call. None: a stop was asked for. Raises
        UserError that names the item and the reply if a score fails or is not a number, and Unavailable if a judge does
        not answer: on all processes, if one finds it."""
        return self.gather(asked, self.begin(policy, asked, stopped))

    def begin(self, policy: Policy, asked: Sequence[Asked], stopped: Callable[[], bool]) -> Share:
        """Write and score this process's share: the replies are divided evenly, in order. `policy.params` is called,
        which may be collective; nothing else is. All processes call `stopped` equally often, as a signal asks for."""
        params, begun = policy.params(), time.monotonic()
        count, process = jax.process_count(), jax.process_index()
        share = asked[len(asked) * process // count : len(asked) * (process + 1) // count]
        stops = (stopped() for _ in range(-(-len(asked) // count)))
        found: dict[Asked, tuple[Episode, Future[Score]]] = {}
        try:
            with self._lock:
                for episode in write(self._engine_of(policy, params), share, self._writing):
                    found[episode.asked] = episode, self._scorers.submit(episode.asked.item, episode.reply)
                    if next(stops):
                        self._engine = None  # with all that is in progress
                        return Share(None)
            if any(stops):
                return Share(None)
            ended = [found[one] for one in share]
            replies = [(episode.asked.item, episode.reply) for episode, _ in ended]
            scores = self._scores(replies, [future for _, future in ended])
            scored = [Scored(episode, score) for (episode, _), score in zip(ended, scores, strict=True)]
            return Share(scored, time.monotonic() - begun)
        except Exception as error:
            any(stops)
            return Share(None, error=error)

    def gather(self, asked: Sequence[Asked], share: Share) -> list[Scored] | None:
        """Replies of all processes, in the order of `asked`. A collective call. None, or raises, as `write` does."""
        shares = processes.on_each(share.as_json)
        if any(replies is None for replies in shares):
            return None
        prompts = {one.item: one.prompt for one in asked}
        scored = [Scored.from_json(one, prompts) for replies in shares for one in replies or ()]
        replies = [(one.episode.asked.item, one.episode.reply) for one in scored]
        scores = self._rewarded(replies, [one.score for one in scored], collective=True)
        return [dataclasses.replace(one, score=score) for one, score in zip(scored, scores, strict=True)]

    def _scores(self, replies: Sequence[tuple[int, Reply]], futures: Sequence[Future[Score]]) -> Sequence[Score]:
        """Scores of replies to items, without rewards that all processes compute together. Raises UserError, with the
        item and the reply, if a score failed or is not finite."""
        scores = [future.result() for future in futures]
        for (i, reply), score in zip(replies, scores, strict=True):
            if score.status == "failed":
                name = self._data.task.name
                raise UserError(f"task: {name} failed to score {reply.text[-60:]!r} for item {i}: {score.note}")
        return self._rewarded(replies, scores, collective=False)

    def _rewarded(
        self, replies: Sequence[tuple[int, Reply]], scores: Sequence[Score], collective: bool
    ) -> Sequence[Score]:
        """Scores with the rewards of `Rollouts.reward` or the task. If all processes compute them together, those of a
        collective call; else those of another. Raises UserError, with the item and the reply, if one is not finite."""
        task, judge = self._data.task, self._data.reward
        if collective != (judge is not None and judge.collective):
            return scores
        values = [score.value for score in scores]
        if judge is not None:
            values = judge([(*task.prompt(i), *reply.turns, Message("assistant", reply.text)) for i, reply in replies])
        for (i, reply), value in zip(replies, values, strict=True):
            if not np.isfinite(value):
                raise UserError(f"reward: got {value} for {reply.text[-60:]!r}, the reply to item {i}, must be finite")
        return [dataclasses.replace(score, value=value) for score, value in zip(scores, values, strict=True)]

    def _engine_of(self, policy: Policy, params: Params) -> Engine:
        if self._engine is None:
            data = self._data
            context = min(n for n in (data.length, policy.model.config.max_positions) if n is not None)
            rows = min(data.rows, -(-data.batch // jax.process_count()))
            self._engine = Engine(policy.model, params, cast(Any, self._tokenizer), rows=rows, context=context)
        else:
            self._engine.update(params)
        return self._engine

    def close(self) -> None:
        """End the processes."""
        self._scorers.close()
