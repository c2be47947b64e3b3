"""Tasks made of tasks: slices, mixtures, and examples before the question."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from gptjax.data.chat import Conversation
from gptjax.data.folds import fold_of
from gptjax.data.sources import check_fraction, held_out
from gptjax.tasks.task import Generation, Reply, Score, Task
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Wrapper(Task):
    """Items of another task. A subclass changes some of what it says of them."""

    task: Task
    """The task."""

    def at(self, i: int) -> int:
        """Number of item `i` in the task."""
        return i

    @property
    def figure(self) -> str:
        return self.task.figure

    @property
    def version(self) -> int:
        return self.task.version

    @property
    def scorer(self) -> str:
        return self.task.scorer

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def generation(self) -> Generation:
        return self.task.generation

    def __len__(self) -> int:
        return len(self.task)

    def example(self, i: int) -> Conversation:
        return self.task.example(self.at(i))

    def prompt(self, i: int) -> Conversation:
        return self.task.prompt(self.at(i))

    def text(self, i: int) -> str:
        return self.task.text(self.at(i))

    def score(self, i: int, reply: Reply) -> Score:
        return self.task.score(self.at(i), reply)

    def cluster(self, i: int) -> str:
        return self.task.cluster(self.at(i))

    def figures(self, replies: Mapping[int, Sequence[str]]) -> Mapping[str, float]:
        return self.task.figures({self.at(i): texts for i, texts in replies.items()})


@dataclasses.dataclass(frozen=True)
class Slice(Wrapper):
    """Items start, start + step, ... before stop of a task, as in Python's slices."""

    start: int | None = None
    """First item. None: 0. Negative: from the end."""
    stop: int | None = None
    """End, not included. None: all."""
    step: int | None = None
    """Distance of two items. None: 1."""

    def __post_init__(self) -> None:
        if self.step == 0:
            raise UserError("step: got 0, must not be 0")

    @functools.cached_property
    def items(self) -> range:
        """Numbers of the items in the task."""
        return range(*slice(self.start, self.stop, self.step).indices(len(self.task)))

    def at(self, i: int) -> int:
        return self.items[i]

    def __len__(self) -> int:
        return len(self.items)


@dataclasses.dataclass(frozen=True)
class HeldOut(Wrapper):
    """Items of a task that `TaskConversations` and `TaskPairs` with the same fraction hold out of training."""

    validation: float = 0.1
    """Fraction of the items, chosen by a hash of the item's cluster."""
    fold: tuple[int, int] | None = None
    """(I, K): those that fold I of K holds out, as in cross-validation. None: by `validation`."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    @functools.cached_property
    def items(self) -> tuple[int, ...]:
        """Numbers of the items in the task."""
        clusters = (self.task.cluster(i) for i in range(len(self.task)))
        return tuple(i for i, cluster in enumerate(clusters) if self._holds_out(cluster))

    def with_fold(self, index: int, count: int) -> HeldOut:
        """The items that a fold of cross-validation holds out."""
        return dataclasses.replace(self, fold=(index, count))

    def _holds_out(self, cluster: str) -> bool:
        if self.fold is None:
            return held_out(cluster, self.validation)
        return fold_of(cluster, self.fold[1]) == self.fold[0]

    def at(self, i: int) -> int:
        return self.items[i]

    def __len__(self) -> int:
        return len(self.items)


@dataclasses.dataclass(frozen=True)
class FewShot(Wrapper):
    """A task with examples before each question: of `pool`, or of the other items, never one of the same cluster.

    Examples are turns of the conversation, or texts before the text. Draws depend on `seed` and the item alone."""

    shots: int = 4
    """Number of examples."""
    seed: int = 0
    """Random seed of the examples."""
    pool: Task | None = None
    """Task to draw the examples from, such as its training part. None: the task itself."""

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise UserError(f"shots: got {self.shots}, must be at least 1")

    @property
    def name(self) -> str:
        return f"{self.task.name}, {self.shots} shots"

    def examples(self, i: int) -> list[int]:
        """Items of the pool that stand before item `i`. Raises UserError if there are too few."""
        pool, own = self.pool or self.task, self.task.cluster(i)
        found = []
        for j in np.random.default_rng([self.seed, i]).permutation(len(pool)):
            if len(found) == self.shots:
                break
            if pool.cluster(int(j)) != own:
                found.append(int(j))
        if len(found) < self.shots:
            raise UserError(f"shots: got {self.shots}, must be at most {len(found)}, the other items of the pool")
        return found

    def example(self, i: int) -> Conversation:
        pool = self.pool or self.task
        shown = itertools.chain.from_iterable(pool.example(j) for j in self.examples(i))
        own = self.task.example(i)
        first = [message for message in own if message.role == "system"]
        return (*first, *(m for m in shown if m.role != "system"), *own[len(first) :])

    def prompt(self, i: int) -> Conversation:
        return self.example(i)[:-1]

    def text(self, i: int) -> str:
        pool = self.pool or self.task
        shown = [f"{pool.text(j)} {pool.example(j)[-1].text.strip()}\n\n" for j in self.examples(i)]
        return "".join(shown) + self.task.text(i)


@dataclasses.dataclass(frozen=True)
class Mixture(Task):
    """The items of several tasks, one task after the other."""

    tasks: tuple[Task, ...]
    """The tasks."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("tasks: got none, must be at least one")

    @functools.cached_property
    def ends(self) -> list[int]:
        """Number of items up to the end of each task."""
        return [*itertools.accumulate(len(task) for task in self.tasks)]

    def at(self, i: int) -> tuple[int, Task, int]:
        """(number of the task, the task, number of the item in it)."""
        number = bisect.bisect_right(self.ends, i)
        return number, self.tasks[number], i - (self.ends[number - 1] if number else 0)

    @property
    def name(self) -> str:
        return " + ".join(task.name for task in self.tasks)

    @property
    def generation(self) -> Generation:
        """The longest replies, and the stops that all tasks have."""
        each = [task.generation for task in self.tasks]
        stop, text_stop = (
            tuple(s for s in getattr(each[0], name) if all(s in getattr(other, name) for other in each))
            for name in ("stop", "text_stop")
        )
        return Generation(max(generation.max_tokens for generation in each), stop, text_stop)

    def __len__(self) -> int:
        return self.ends[-1]

    def example(self, i: int) -> Conversation:
        _, task, j = self.at(i)
        return task.example(j)

    def prompt(self, i: int) -> Conversation:
        _, task, j = self.at(i)
        return task.prompt(j)

    def text(self, i: int) -> str:
        _, task, j = self.at(i)
        return task.text(j)

    def score(self, i: int, reply: Reply) -> Score:
        _, task, j = self.at(i)
        return task.score(j, reply)

    def cluster(self, i: int) -> str:
        number, task, j = self.at(i)
        return f"{number}: {task.cluster(j)}"
