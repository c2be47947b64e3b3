"""Multiple choice by likelihood: the option is chosen that is most likely as the continuation of its context.

    MultipleChoice(tasks.ArcEasy("arc_easy/test.jsonl"))(language_model).values["accuracy_per_character"]

Options differ in length, and there are five usual ways to allow for that. With log p the log-likelihood of an option:

    accuracy                        log p
    accuracy_per_character          log p / characters of the option       lm-eval's acc_norm
    accuracy_per_byte               log p / bytes of the option in UTF-8   lm-eval's acc_bytes
    accuracy_per_token              log p / tokens of the option           nanochat's and DCLM's
    accuracy_by_mutual_information  log p - log p(option | no question)    lm-eval's acc_mutual_info, "PMI"

All are reported. The task says which one is its figure (`ChoiceTask.normalisation`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import digest
from gptjax.evals import intervals
from gptjax.evals.likelihood import Likelihood, cut, encode, score
from gptjax.protocols import Evaluation, Tokenizer
from gptjax.tasks import Choices, ChoiceTask, FewShot, Task
from gptjax.types import Result, UserError

FIGURES = {
    "none": "accuracy",
    "character": "accuracy_per_character",
    "byte": "accuracy_per_byte",
    "token": "accuracy_per_token",
    "mutual information": "accuracy_by_mutual_information",
}
"""`ChoiceTask.normalisation` -> name of the figure."""
CHECKED = 8
"""Number of items that are encoded before training, to find errors early."""


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Evaluation):
    """Share of items whose right option is the most likely one: `MultipleChoice(task)(language_model) -> Result`."""

    task: ChoiceTask
    """Task whose items have options: `tasks.ArcEasy`, ..."""
    items: int | None = None
    """Number of items, the first of the task. None: all."""
    shots: int = 0
    """Number of answered items before each, none of its cluster."""
    seed: int = 0
    """Random seed of the answered items."""
    pool: Task | None = None
    """Task to draw the answered items from, such as its training part. None: the task itself."""

    mutual_information: bool = True
    """Read each option without its question too, for `accuracy_by_mutual_information`."""

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 1:
            raise UserError(f"items: got {self.items}, must be at least 1")
        if self.shots < 0:
            raise UserError(f"shots: got {self.shots}, must be at least 0")
        for name, task in (("task", self.task), ("pool", self.pool)):
            if task is not None and not isinstance(task, ChoiceTask):
                raise UserError(f"{name}: got {task.name}, must have options, as tasks.ArcEasy has")
        if self.task.normalisation == "mutual information" and not self.mutual_information:
            raise UserError(f"mutual_information: got False, must be True: it is the figure of {self.task.name}")

    def check(self, tokenizer: Tokenizer) -> None:
        encode(tokenizer, [pair for i in self._chosen()[:CHECKED] for pair in self._told(i, self.task.choices(i))])

    def __call__(self, model: Any) -> Result:
        chosen = self._chosen()
        items = [self.task.choices(i) for i in chosen]
        pairs = [pair for i, item in zip(chosen, items, strict=True) for pair in self._told(i, item)]
        bare = [(item.unconditional, text) for item in items for _, text in item.options]
        whole = encode(model.tokenizer, pairs + bare * self.mutual_information)
        limit = model.max_length or sys.maxsize
        requests = [cut(request, limit) for request in whole]
        scored = score(model.config, model.params, requests, model.rules)
        told, untold = iter(scored[: len(pairs)]), iter(scored[len(pairs) :])
        records = []
        for i, item in zip(chosen, items, strict=True):
            n = len(item.options)
            records.append(self._record(i, item, [*itertools.islice(told, n)], [*itertools.islice(untold, n)]))
        shortened = sum(len(a.context) < len(b.context) for a, b in zip(requests, whole, strict=True))
        return self._result(records, shortened, digest([list(pair) for pair in pairs])[:12])

    def _chosen(self) -> range:
        if not (count := len(self.task)):
            raise UserError(f"task: {self.task.name} has no items, must have at least one")
        return range(min(count, self.items or count))

    def _told(self, i: int, item: Choices) -> list[tuple[str, str]]:
        """(context, continuation) of each option of item `i`, answered items before the context."""
        before = self._before(i)
        return [(before + context, continuation) for context, continuation in item.options]

    def _before(self, i: int) -> str:
        """Answered items before item `i`, parted by empty lines."""
        if not self.shots:
            return ""
        pool, shown = self.pool or self.task, []
        for j in FewShot(self.task, self.shots, self.seed, self.pool).examples(i):
            assert isinstance(pool, ChoiceTask)
            item = pool.choices(j)
            shown.append("".join(item.options[item.answer]) + "\n\n")
        return "".join(shown)

    def _record(self, i: int, item: Choices, told: Sequence[Likelihood], untold: Sequence[Likelihood]) -> dict:
        """Result of an item, of JSON types."""
        values = np.array([likelihood.logprob for likelihood in told])
        texts = [continuation.strip() for _, continuation in item.options]
        by = {
            "none": values,
            "character": values / [max(len(text), 1) for text in texts],
            "byte": values / [max(len(text.encode()), 1) for text in texts],
            "token": values / [likelihood.tokens for likelihood in told],
        }
        if untold:
            by["mutual information"] = values - [likelihood.logprob for likelihood in untold]
        chosen = {FIGURES[name]: int(np.argmax(each)) for name, each in by.items()}
        return {
            "item": i,
            "cluster": self.task.cluster(i),
            "outcome": float(chosen[FIGURES[self.task.normalisation]] == item.answer),
            "answer": item.answer,
            "options": len(item.options),
            "chosen": chosen,
            "logprobs": values.tolist(),
            "tokens": [likelihood.tokens for likelihood in told],
        }

    def _result(self, records: Sequence[dict[str, Any]], shortened: int, prompts: str) -> Result:
        clusters = [record["cluster"] for record in records]
        own = FIGURES[self.task.normalisation]
        values, rows = {}, []
        for name in records[0]["chosen"]:
            right = [float(record["chosen"][name] == record["answer"]) for record in records]
            interval = intervals.mean(right, clusters)
            values |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
            mark = "**" if name == own else ""
            rows.append(f"| {mark}{name}{mark} | {interval:.1%} |")
        chance = float(np.mean([1 / record["options"] for record in records]))
        values |= {"chance": chance, "items": len(records), "cut_contexts": shortened}
        said = f" {shortened:,} contexts were cut on the left to fit the model." if shortened else ""
        markdown = [
            f"**{values[own]:.1%}** right by {own}, the task's figure; chance is {chance:.1%}.{said}",
            "",
            "| figure | mean, 95 % interval |",
            "|---|---|",
            *rows,
            "",
            f"`{self.signature(prompts, len(records))}`",
        ]
        return Result(self.task.name, values, "\n".join(markdown), tuple(records))

    def signature(self, prompts: str, items: int) -> str:
        """All that the figures depend on but the model, as "name:value|name:value": figures of two signatures are not
        to be compared. prompts: digest of the texts."""
        values = {
            "task": self.task.name,
            "version": self.task.version,
            "form": "likelihood",
            "figure": FIGURES[self.task.normalisation],
            "prompts": prompts,
            "items": items,
            "shots": self.shots,
            "seed": self.seed,
            "gptjax": importlib.metadata.version("gptjax"),
        }
        return "|".join(f"{name}:{value}" for name, value in values.items())
