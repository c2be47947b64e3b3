"""Writer of rollouts: an engine, and processes that score what it writes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from gptjax.data.chat import Message, conversation
from gptjax.inference.engine import Engine
from gptjax.protocols import Tokenizer
from gptjax.tasks.scorers import Scorers
from gptjax.tasks.task import Reply, Score
from gptjax.train.episodes import Asked, Episode, write
from gptjax.types import Unavailable, UserError

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


class Writer:
    """An engine, and processes that score what it writes. Safe to use from two threads, one after the other."""

    def __init__(self, data: Rollouts, tokenizer: Tokenizer):
        self._data, self._tokenizer = data, tokenizer
        self._writing = data.writing(tokenizer)
        self._scorers = Scorers(data.task, data.workers, data.timeout)
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self.failure: Unavailable | None = None
        """Error of a judge that does not answer."""

    def probe(self, items: Sequence[int]) -> None:
        """Score right and empty replies. Raises UserError if all rewards are the same, or one is not a number, and if
        the model cannot converse with the tools."""
        task = self._data.task
        self._writing.check(self._data.messages(items[0]))
        replies = [(i, Reply(text)) for i in items[:PROBES] for text in (task.example(i)[-1].text, "")]
        futures = [self._scorers.submit(i, reply) for i, reply in replies]
        scores = self._rewarded(replies, [future.result() for future in futures])
        rewards = {score.value for score in scores}
        if len(rewards) == 1:
            reward = rewards.pop()
            raise UserError(
                f"task: got one reward for right and for empty replies to {task.name}, {reward:g}, must tell them apart"
            )

    def write(self, policy: Policy, asked: Sequence[Asked], stopped: Callable[[], bool]) -> list[Scored] | None:
        """Replies of the policy, in the order of `asked`. None: a stop was asked for, or the judge does not answer.
        Raises UserError that names the item and the reply if a score fails or is not a number."""
        found: dict[Asked, tuple[Episode, Future[Score]]] = {}
        with self._lock:
            for episode in write(self._engine_of(policy), asked, self._writing):
                one = episode.asked
                found[one] = episode, self._scorers.submit(one.item, episode.reply)
                if stopped():
                    self._engine = None  # with all that is in progress
                    return None
        ended = [found[one] for one in asked]
        replies = [(episode.asked.item, episode.reply) for episode, _ in ended]
        try:
            scores = self._rewarded(replies, [future.result() for _, future in ended])
        except Unavailable as error:
            self.failure = error
            return None
        return [Scored(episode, score) for (episode, _), score in zip(ended, scores, strict=True)]

    def _rewarded(self, replies: Sequence[tuple[int, Reply]], scores: Sequence[Score]) -> Sequence[Score]:
        """Scores of replies to items, with the rewards of `Rollouts.reward`. Raises UserError, with the item and the
        reply, if a score failed or a reward is not finite."""
        task, judge = self._data.task, self._data.reward
        values = [score.value for score in scores]
        if judge is not None:
            values = judge([(*task.prompt(i), *reply.turns, Message("assistant", reply.text)) for i, reply in replies])
        for (i, reply), score, value in zip(replies, scores, values, strict=True):
            text = reply.text
            if score.status == "failed":
                raise UserError(f"task: {task.name} failed to score {text[-60:]!r} for item {i}: {score.note}")
            if not np.isfinite(value):
                raise UserError(f"reward: got {value} for {text[-60:]!r}, the reply to item {i}, must be finite")
        return [dataclasses.replace(score, value=value) for score, value in zip(scores, values, strict=True)]

    def _engine_of(self, policy: Policy) -> Engine:
        if self._engine is None:
            data = self._data
            context = min(n for n in (data.length, policy.model.config.max_positions) if n is not None)
            rows = min(data.rows, data.batch)
            self._engine = Engine(policy.model, policy.params(), cast(Any, self._tokenizer), rows=rows, context=context)
        else:
            self._engine.update(policy.params())
        return self._engine

    def close(self) -> None:
        """End the processes."""
        self._scorers.close()
