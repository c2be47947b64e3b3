"""A model as a judge: of two replies, the better one; of one reply, a grade.

    question(prompt, "first reply", "second reply")                            # to be sent; verdict() reads the answer
    Rollouts(task, reward=Judge("http://localhost:8000", "qwen3"))             # grades as rewards

Each pair is judged in both orders; a judge that changes its mind with the order says tie (Zheng et al. 2023,
arXiv:2306.05685). Its bias towards the first reply is then a figure of the report.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence

from gptjax.data.chat import Conversation, Message
from gptjax.evals.ratings import Choice
from gptjax.io.chat_server import ChatServer, in_parallel
from gptjax.protocols import Reward
from gptjax.types import Unavailable, UserError

INSTRUCTIONS = """\
Compare the replies of two assistants to the conversation below. Judge how correct, helpful, relevant and clear they
are. Neither their order nor their length matters. Explain your judgement in a few sentences, then end with one line:
[[A]] if reply A is better, [[B]] if reply B is better, [[C]] if they are equally good, [[D]] if both are bad."""
VERDICTS: dict[str, Choice] = {"A": "left", "B": "right", "C": "tie", "D": "both bad"}
_VERDICT = re.compile(r"\[\[([ABCD])\]\]")


def question(prompt: Conversation, first: str, second: str) -> str:
    """The text to send to the judge."""
    return _laid_out(INSTRUCTIONS, prompt, {"Reply A": first, "Reply B": second})


def verdict(text: str) -> Choice | None:
    """The last verdict in the judge's reply, or None: it gave none."""
    found = _VERDICT.findall(text)
    return VERDICTS[found[-1]] if found else None


def as_messages(prompt: Conversation, first: str, second: str) -> list[Message]:
    """The conversation with the judge."""
    return [Message("user", question(prompt, first, second))]


GRADING = """\
Grade the reply of an assistant to the conversation below. Judge how correct, helpful, relevant and clear it is; its
length does not matter. Explain your grade in a few sentences, then end with one line: the grade in double brackets,
such as [[{best:g}]], where [[{worst:g}]] is the worst grade and [[{best:g}]] the best."""
_GRADE = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")


@dataclasses.dataclass(frozen=True)
class Judge(Reward):
    """Grades of replies by a model behind an OpenAI-compatible address, as rewards from 0, the worst, to 1.

    The environment's GPTJAX_API_KEY is its key. The last grade of an answer counts. Requests are repeated after
    transient errors; a run whose judge does not answer then stops at a checkpoint."""

    url: str
    """Address of the server, with or without /v1."""
    model: str
    """Name of the server's model."""
    instructions: str = GRADING
    """Text before the conversation and the reply. {worst} and {best} stand for the grades of `scale`."""
    scale: tuple[float, float] = (1.0, 10.0)
    """Worst and best grade."""
    ungraded: float | None = None
    """Reward of a reply that the judge gives no grade on the scale. None: such a reply ends the run."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    max_tokens: int = 512
    """Maximum length of the judge's answer, in tokens."""
    requests: int = 8
    """Replies that are judged at a time."""
    seconds: float = 600.0
    """Seconds after which an answer counts as lost."""

    def __post_init__(self) -> None:
        self.server  # noqa: B018 raises UserError
        worst, best = self.scale
        if not worst < best:
            raise UserError(f"scale: got {worst:g} to {best:g}, must be a worst grade below the best")
        for name in ("max_tokens", "requests"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name}: got {value}, must be at least 1")
        try:
            self._asked()
        except (LookupError, ValueError):
            raise UserError("instructions: got braces around other words than worst and best; double them") from None

    @functools.cached_property
    def server(self) -> ChatServer:
        """Client of the server."""
        return ChatServer(self.url, self.model, self.seconds)

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """Reward of the reply that ends each conversation. Raises Unavailable if the server does not answer, or
        answers without a grade."""
        rewards = [math.nan] * len(conversations)

        def judged(i: int) -> tuple[int, float]:
            return i, self.reward(conversations[i])

        for i, reward in in_parallel(judged, range(len(conversations)), self.requests):
            rewards[i] = reward
        return rewards

    def text(self, conversation: Conversation) -> str:
        """The text to send to the judge about the reply that ends a conversation."""
        return _laid_out(self._asked(), conversation[:-1], {"Reply": conversation[-1].text})

    def reward(self, conversation: Conversation) -> float:
        """Reward of the reply that ends a conversation."""
        reply, said = conversation[-1], {"role": "user", "content": self.text(conversation)}
        answer = self.server.reply([said], temperature=self.temperature, max_tokens=self.max_tokens).text
        (worst, best), grades = self.scale, _GRADE.findall(answer)
        if grades and worst <= (grade := float(grades[-1])) <= best:
            return (grade - worst) / (best - worst)
        if self.ungraded is None:
            raise Unavailable(
                f"reward: got no grade from {worst:g} to {best:g} of {self.model} for {reply.text[-60:]!r}, but "
                f"{answer[-60:]!r}; set ungraded to the reward of such a reply"
            )
        return self.ungraded

    def fingerprint(self) -> str:
        own = [self.model, self._asked(), self.scale, self.ungraded, self.temperature, self.max_tokens]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()

    def _asked(self) -> str:
        worst, best = self.scale
        return self.instructions.format(worst=worst, best=best)


def _laid_out(instructions: str, prompt: Conversation, replies: dict[str, str]) -> str:
    """Instructions, then a conversation and replies to it, each under its name."""
    said = "\n\n".join(f"{message.role}: {message.text}" for message in prompt)
    parts = {"Conversation": said, **replies}
    return "\n\n".join([instructions, *(f"=== {name} ===\n{text}" for name, text in parts.items()), "=== End ==="])
