"""Generated puzzles with verifiers, of the library reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760).

    ReasoningGym("chain_sum", size=10_000, config={"max_terms": 3})

needs `pip install 'gptjax[gym]'`, which compiles a small C library.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from typing import Any

from gptjax.data.chat import Conversation, Message
from gptjax.tasks.task import Generation, Reply, Score, Task, unanswered
from gptjax.types import UserError, one_line

TAGS = "Think first. Then write the answer, and nothing else, between <answer> and </answer>."


@dataclasses.dataclass(frozen=True)
class ReasoningGym(Task):
    """Items of a dataset of reasoning-gym, which are pure functions of `seed`, `config` and their number.

    The library's verifier scores an answer from 0 to 1; the outcome is 1 for a score of 1, and the score is in `parts`.
    Items with the same question are one cluster, so that no held-out question is trained on."""

    dataset: str
    """Name of the dataset: chain_sum, countdown, sudoku, ..."""
    seed: int = 0
    """Random seed of the items."""
    size: int = 1_000
    """Number of items."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Settings of the dataset, such as {"min_terms": 2, "max_terms": 3}."""
    tagged: bool = False
    """True: the prompt asks for reasoning and for an answer in <answer></answer>, of which the last counts. False: the
    whole reply is the answer."""
    partial: bool = False
    """True: the reward is the library's score, which pays some answers that are wrong or have the right one in them.
    False: the outcome."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size: got {self.size}, must be at least 1")
        if taken := {"seed", "size"} & self.config.keys():
            raise UserError(f"config: got {taken.pop()}, must be set beside config")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _ = self._made  # a process that scores imports the library before the first score's time begins

    def __len__(self) -> int:
        return self.size

    def example(self, i: int) -> Conversation:
        entry = self._entry(i)
        if not isinstance(entry["answer"], str):
            raise UserError(f"dataset: got {self.dataset}, which has no right answer to item {i}, must be another")
        asked = f"{entry['question']}\n\n{TAGS}" if self.tagged else entry["question"]
        answer = f"<answer>{entry['answer']}</answer>" if self.tagged else entry["answer"]
        return Message("user", asked), Message("assistant", answer)

    def score(self, i: int, reply: Reply) -> Score:
        answer: str | None = reply.text.strip()
        if self.tagged:
            from reasoning_gym.utils import extract_answer

            answer = extract_answer(reply.text)
        if not answer:
            return unanswered(reply)
        try:
            with warnings.catch_warnings(action="ignore"):
                found = min(max(float(self._made.score_answer(answer, self._entry(i))), 0.0), 1.0)
        except Exception as error:  # verifiers parse what a model wrote, some without expecting the worst
            return dataclasses.replace(unanswered(reply), note=f"{type(error).__name__}: {one_line(error)}")
        outcome = float(found == 1)
        return Score(outcome, value=found if self.partial else outcome, parts={"score": found}, extracted=answer)

    def cluster(self, i: int) -> str:
        return self._entry(i)["question"]

    @property
    def name(self) -> str:
        return self.dataset

    @property
    def scorer(self) -> str:
        return f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=512 if self.tagged else 64)

    @property
    def _made(self) -> Any:
        return _dataset(self.dataset, self.seed, self.size, json.dumps(self.config))

    def _entry(self, i: int) -> dict[str, Any]:
        return _entry(self.dataset, self.seed, self.size, json.dumps(self.config), i)


@functools.cache
def _dataset(name: str, seed: int, size: int, config: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("task: ReasoningGym needs the reasoning-gym library; pip install 'gptjax[gym]'") from None
    if name not in DATASETS:
        like = difflib.get_close_matches(name, DATASETS, 5, 0.0)
        raise UserError(f"dataset: got {name!r}, must be one of reasoning-gym's, such as {', '.join(like)}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(config))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"config: got {config}, which {name} does not take: {one_line(error)}") from None


@functools.lru_cache(1 << 16)
def _entry(name: str, seed: int, size: int, config: str, i: int) -> dict[str, Any]:
    return _dataset(name, seed, size, config)[i]
