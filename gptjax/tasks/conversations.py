"""Items of a task to fine-tune on: `Chat(TaskConversations(Gsm8k("train.jsonl")))`, and for an encoder-decoder
`Pairs(TaskPairs(Translate("train.jsonl")), ...)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gptjax.data.chat import Conversation
from gptjax.data.pairs import TextPair
from gptjax.data.sources import check_fraction, of_split
from gptjax.protocols import Split
from gptjax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class TaskConversations:
    """Source of the right conversations of a task, an item each."""

    task: Task
    """The task."""
    validation: float = 0.1
    """Fraction of the items held out for validation, chosen by a hash of the item's cluster. 0: none."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[Conversation]:
        return of_split(self.keyed(), split, self.task.name, self.validation)

    def keyed(self) -> Iterator[tuple[str, Conversation]]:
        """All conversations, each with the cluster of its item."""
        return ((self.task.cluster(i), self.task.example(i)) for i in range(len(self.task)))

    def questions(self, n: int) -> list[tuple[str, str]]:
        """Up to `n` prompts of the validation split, each with its right reply."""
        held_out = zip(range(n), self.documents("validation"), strict=False)
        return [(example[-2].text, example[-1].text) for _, example in held_out]

    def fingerprint(self) -> str:
        return f"{self.task.fingerprint()}-{self.validation:g}"


@dataclasses.dataclass(frozen=True)
class TaskPairs:
    """Source of the prompts of a task as texts, each with its right reply."""

    task: Task
    """The task."""
    validation: float = 0.1
    """Fraction of the items held out for validation, chosen by a hash of the item's cluster. 0: none."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[TextPair]:
        return of_split(self.keyed(), split, self.task.name, self.validation)

    def keyed(self) -> Iterator[tuple[str, TextPair]]:
        """All pairs, each with the cluster of its item."""
        task = self.task
        return ((task.cluster(i), TextPair(task.text(i), task.example(i)[-1].text)) for i in range(len(task)))

    def fingerprint(self) -> str:
        return f"{self.task.fingerprint()}-{self.validation:g}"
