"""Tasks: items to learn from, to be evaluated on and to be rewarded for.

    task = Gsm8k("gsm8k/test.jsonl")
    task.example(3)                                # conversation that ends with a right reply: to learn from
    task.prompt(3)                                 # the messages before it: to be answered
    task.score(3, Reply("... The answer is 72."))  # Score(value=1.0, outcome=1.0, ...): a metric, or a reward

A task is a frozen dataclass with `__len__`, `example` and `score`; a new one is one class. `ChoiceTask` adds options
that are compared by their likelihoods, which also fits models that cannot converse.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from gptjax.data.chat import Conversation
from gptjax.types import UserError

Status = Literal["scored", "not found", "cut off", "too long", "timed out", "failed"]
"""Course of scoring a reply.

    scored     right or wrong
    not found  no answer could be extracted
    cut off    the reply ended at its maximum length, without an answer
    too long   the prompt leaves no room for a reply in the model's context
    timed out  the scorer, such as a program's tests, took too long
    failed     the scorer itself raised an error
"""


@dataclasses.dataclass(frozen=True)
class Reply:
    """Reply of a model to the prompt of an item."""

    text: str
    """Text of the last message."""
    finished: bool = True
    """False: cut off at its maximum length. The engine's word, not a guess from the text."""
    turns: Conversation = ()
    """Messages between prompt and text: calls of tools and their results."""


_OUTCOME = float("nan")
"""Default of `Score.value`, known by its identity: another NaN is a task's mistake, which training names."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Score of a reply. Raises UserError for an outcome that is not in [0, 1]."""

    outcome: float
    """The task's figure for this item, from 0 to 1: 1 for a right answer."""
    value: float = dataclasses.field(default=_OUTCOME, kw_only=True)
    """Reward: the outcome, unless the task adds something, for the form of a reply say."""
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict, kw_only=True, hash=False)
    """Further figures by name."""
    status: Status = dataclasses.field(default="scored", kw_only=True)
    """Course of the scoring."""
    extracted: str | None = dataclasses.field(default=None, kw_only=True)
    """The answer that was found in the reply."""
    note: str = dataclasses.field(default="", kw_only=True)
    """Reason why there is no score, for people."""

    def __post_init__(self) -> None:
        if not 0 <= self.outcome <= 1:
            raise UserError(f"outcome: got {self.outcome}, must be from 0 to 1")
        if self.value is _OUTCOME:
            object.__setattr__(self, "value", float(self.outcome))


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings to generate replies with, unless an evaluation has others."""

    max_tokens: int = 256
    """Maximum length of a reply, in tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, besides the model's own end of a message."""
    text_stop: tuple[str, ...] = ("\nQuestion:",)
    """Texts that end the reply of a model that continues `Task.text`."""


class Task(abc.ABC):
    """Items with a prompt, a right reply and a score. Base class of frozen dataclasses."""

    graded: ClassVar[bool] = False
    """True: outcomes between 0 and 1 measure an overlap, of which wrong replies have some too."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abc.abstractmethod
    def example(self, i: int) -> Conversation:
        """Item `i`, from 0, as a conversation that ends with a right reply of the assistant."""

    @abc.abstractmethod
    def score(self, i: int, reply: Reply) -> Score:
        """Score of a reply to `prompt(i)`."""

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the class, its version and all examples, wherever their file lies."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.version}".encode())
        for i in range(len(self)):
            digest.update(json.dumps([message.as_json() for message in self.example(i)]).encode())
        return digest.hexdigest()

    def prompt(self, i: int) -> Conversation:
        """Item `i` up to the assistant's reply."""
        return self.example(i)[:-1]

    def text(self, i: int) -> str:
        """Prompt of item `i` for a model that continues texts and cannot converse."""
        return as_text(self.prompt(i))

    def figures(self, replies: Mapping[int, Sequence[str]]) -> Mapping[str, float]:
        """Figures of all replies together, such as BLEU, by name. replies: item -> its replies, as many for each."""
        return {}

    def cluster(self, i: int) -> str:
        """Name of what the item shares with others, such as a passage. Intervals count clusters, not items."""
        return str(i)

    @property
    def figure(self) -> str:
        """Name of the mean outcome."""
        return "accuracy"

    @property
    def version(self) -> int:
        """Raised whenever prompts or scores change, so that figures of two versions are never compared."""
        return 1

    @property
    def scorer(self) -> str:
        """Name, version and settings of the library that scores, such as sacrebleu's signature, or ""."""
        return ""

    @property
    def name(self) -> str:
        """Name in reports."""
        return type(self).__name__

    @property
    def generation(self) -> Generation:
        """Maximum length and stops of a reply."""
        return Generation()


def unanswered(reply: Reply, parts: Mapping[str, float] | None = None) -> Score:
    """Score of a reply in which no answer was found."""
    return Score(0.0, parts=parts or {}, status="not found" if reply.finished else "cut off")


def as_text(messages: Conversation) -> str:
    """A conversation up to the assistant's reply, as a text: "Question: ...\\nAnswer:". Examples before it are parted
    by empty lines."""
    names = {"user": "Question: ", "assistant": "Answer: "}
    lines = [names.get(message.role, "") + message.text for message in messages]
    ends = ["\n" if message.role == "user" else "\n\n" for message in messages]
    return "".join(line + end for line, end in zip(lines, ends, strict=True)) + "Answer:"


@dataclasses.dataclass(frozen=True)
class Choices:
    """Options of an item, to be compared by their likelihoods."""

    options: tuple[tuple[str, str], ...]
    """(context, continuation) of each option. The likelihood is the continuation's, given the context. In most tasks
    the contexts are the same; in those like Winograd's the continuations are."""
    answer: int
    """Index of the right option."""
    unconditional: str = ""
    """Context without the question, such as "Answer:", for mutual information."""

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.options):
            raise UserError(f"answer: got {self.answer}, must be from 0 to {len(self.options) - 1}")


Normalisation = Literal["none", "character", "byte", "token", "mutual information"]
"""Treatment of the log-likelihoods of options: as they are, divided by the option's characters, bytes in UTF-8 or
tokens, or less the log-likelihood without a question."""


class ChoiceTask(Task):
    """A task whose items have options. `example` asks for one of them in a conversation."""

    @property
    def normalisation(self) -> Normalisation:
        """The treatment by which the task's figure chooses an option. Evaluations report all."""
        return "none"

    @abc.abstractmethod
    def choices(self, i: int) -> Choices:
        """Options of item `i`, for a model that continues texts."""
