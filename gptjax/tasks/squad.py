"""Questions about passages: SQuAD."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import hashlib
import itertools
import re
import string
from collections.abc import Sequence

from gptjax.data.chat import Conversation, Message
from gptjax.data.files import Where
from gptjax.data.questions import questions_of
from gptjax.tasks.rows import read_items
from gptjax.tasks.task import Generation, Reply, Score, Task, unanswered
from gptjax.types import Json, UserError

ASKED = "\nAnswer with the shortest words of the passage that answer it, and nothing else."
NONE = "unanswerable"
OR_NONE = f' If it does not answer it, say "{NONE}".'


@dataclasses.dataclass(frozen=True)
class Passage:
    """A question about a passage."""

    context: str
    question: str
    answers: tuple[str, ...]
    """Right answers. Empty: the passage has none."""


class Reading(Task):
    """Questions about passages. Base class; a subclass defines `__len__` and `passage`.

    The outcome is exact match with one of the answers, `parts` has F1 too, both without case, punctuation and articles.
    Questions about one passage form a cluster."""

    @abc.abstractmethod
    def passage(self, i: int) -> Passage:
        """Item `i`."""

    @property
    def unanswerable(self) -> bool:
        """True: some questions have no answer (SQuAD 2.0), and all prompts allow for it."""
        return False

    @property
    def figure(self) -> str:
        return "exact_match"

    def example(self, i: int) -> Conversation:
        item = self.passage(i)
        asked = f"{item.context}\n\nQuestion: {item.question}{ASKED}{OR_NONE if self.unanswerable else ''}"
        return Message("user", asked), Message("assistant", item.answers[0] if item.answers else NONE)

    def text(self, i: int) -> str:
        item = self.passage(i)
        return f"{item.context}\n\nQuestion: {item.question}\nAnswer:"

    def score(self, i: int, reply: Reply) -> Score:
        if not (said := normalised(reply.text)):
            return unanswered(reply, {"f1": 0.0})
        exact, overlap = match(reply.text, self.passage(i).answers or (NONE,))
        return Score(exact, parts={"f1": overlap}, extracted=" ".join(said))

    def cluster(self, i: int) -> str:
        return hashlib.sha256(self.passage(i).context.encode()).hexdigest()[:16]

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=48, text_stop=("\n",))


@dataclasses.dataclass(frozen=True)
class Squad(Reading):
    """SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, arXiv:1606.05250): its JSON file, or rows with "context", "question"
    and "answers": {"text": [...]}."""

    path: str
    """File of the questions, a glob or a URL."""

    @functools.cached_property
    def questions(self) -> tuple[Passage, ...]:
        """All questions. Raises UserError, with file and line, for a row without one."""
        return tuple(itertools.chain.from_iterable(read_items(self.path, _read)))

    @functools.cached_property
    def _unanswerable(self) -> bool:
        return not all(item.answers for item in self.questions)

    @property
    def unanswerable(self) -> bool:
        return self._unanswerable

    def __len__(self) -> int:
        return len(self.questions)

    def passage(self, i: int) -> Passage:
        return self.questions[i]


@dataclasses.dataclass(frozen=True)
class OtherPassage(Reading):
    """The questions of a task, each with the passage of another item: a control. Right answers stay those of the own
    passage, so what is left above chance does not come from reading."""

    task: Reading
    """The task."""

    def __len__(self) -> int:
        return len(self.task)

    @property
    def name(self) -> str:
        return f"{self.task.name}, other passages"

    @property
    def version(self) -> int:
        return self.task.version

    @property
    def unanswerable(self) -> bool:
        return self.task.unanswerable

    def passage(self, i: int) -> Passage:
        own, count = self.task.passage(i), len(self)
        others = (self.task.passage((i + step) % count) for step in range(1, count))
        other = next((other for other in others if other.context != own.context), None)
        if other is None:
            raise UserError("task: got one passage for all items, must be several to exchange them")
        return dataclasses.replace(own, context=other.context)

    def cluster(self, i: int) -> str:
        return self.task.cluster(i)

    @property
    def generation(self) -> Generation:
        return self.task.generation


def normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles, as SQuAD's own script has them."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def match(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 with the nearest of the right answers; without any, the right one is empty."""
    words, right = normalised(said), [normalised(answer) for answer in answers or ("",)]
    return float(words in right), max(f1(words, answer) for answer in right)


def f1(said: list[str], right: list[str]) -> float:
    """Harmonic mean of precision and recall of words."""
    common = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else float(said == right)


def _read(where: Where, row: Json) -> list[Passage]:
    return [Passage(found.context, found.question, found.answers) for found in questions_of(row, located=False)]
