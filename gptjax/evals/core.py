"""CORE of DCLM (Li et al. 2024, arXiv:2406.11794): mean centred accuracy of 22 tasks, from their bundle.

    Core("eval_bundle")(language_model).values["core"]

The bundle is a folder with `core.yaml` (tasks), `eval_data/` (JSON lines) and `eval_meta_data.csv` (baselines), as
nanochat downloads it. Prompts, examples and choices are nanochat's, item by item: items are shuffled with seed 1337,
item i has the examples of `random.Random(1234 + i)`, and there are three kinds of tasks.

    multiple_choice    choices after one query; lowest mean loss a token
    schema             one continuation after several contexts; lowest mean loss a token
    language_modeling  right if greedy decoding writes the continuation

With the accuracy a and the baseline b of a task, its centred accuracy is (a - b) / (1 - b).
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import digest
from gptjax.evals import intervals
from gptjax.evals.likelihood import Continuation, Likelihood, cut, score
from gptjax.protocols import Evaluation, Tokenizer
from gptjax.types import Result, UserError

Item = Mapping[str, Any]
FIELDS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
"""Kind of a task -> fields of its items."""
SWAPPED = {"multiple_choice": "query", "schema": "context_options", "language_modeling": "context"}
"""Kind of a task -> field of another item that the control puts in."""
V1 = {
    "boolq": 62.0,
    "siqa": 33.3,
    "commonsense_qa": 20.0,
    "bigbench_language_identification": 9.1,
}
"""Baselines of DCLM's first file, in percent, that are not 100 / options: a file with all of them is called v1."""


class CoreTask(NamedTuple):
    """A task of the bundle."""

    label: str
    kind: str
    file: Path
    shots: int
    delimiter: str
    """Text between a context and its continuation."""
    baseline: float
    """Accuracy without knowledge, from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Core(Evaluation):
    """Mean centred accuracy of the bundle's tasks: `Core(bundle)(language_model) -> Result`."""

    bundle: str
    """Folder of the bundle."""
    items: int | None = None
    """Number of items of each task, the first after shuffling. None: all."""
    baselines: str | None = None
    """File of the baselines, such as DCLM's corrected `eval_meta_data.csv`. None: the bundle's."""
    control: bool = False
    """Measure each task again with the context of another item, where only a model that ignores contexts is better than
    chance."""

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 1:
            raise UserError(f"items: got {self.items}, must be at least 1")

    def check(self, tokenizer: Tokenizer) -> None:
        for task in self.tasks():
            items = self._read(task)[: task.shots + 1]
            _requests(task, items, 0, tokenizer)

    def __call__(self, model: Any) -> Result:
        self.check(model.tokenizer)
        centred, values, rows, records = {}, {}, [], []
        for task in self.tasks():
            items = self._read(task)
            right = _right(model, task, items, items)
            interval = intervals.mean(right)
            own = _centred(interval.mean, task.baseline)
            centred[task.label] = own, task.baseline, interval
            values |= {task.label: interval.mean, f"{task.label}_centred": own}
            row = f"| {task.label} | {task.shots} | {interval:.1%} | {task.baseline:.1%} | {own:.3f} |"
            if self.control:
                field = SWAPPED[task.kind]
                swapped = [{**a, field: b[field]} for a, b in zip(items, [*items[1:], items[0]], strict=True)]
                found = _centred(intervals.mean(_right(model, task, items, swapped)).mean, task.baseline)
                values[f"{task.label}_control"] = found
                row += f" {found:.3f} |"
            rows.append(row)
            records += [
                {"item": i, "cluster": f"{task.label} {i}", "task": task.label, "outcome": outcome}
                for i, outcome in enumerate(right)
            ]
        core = sum(value for value, _, _ in centred.values()) / len(centred)
        half = _half_width(centred.values())
        values = {"core": core, "core_low": core - half, "core_high": core + half, **values}
        name = self.baseline_name()
        head = "| task | shots | accuracy, 95 % interval | baseline | centred |" + " control |" * self.control
        markdown = [
            f"**{core:.4f}** [{core - half:.4f}, {core + half:.4f}] over {len(centred)} tasks, {len(records):,} items; "
            f"baselines: {name}.",
            "",
            head,
            "|---|---|---|---|---|" + "---|" * self.control,
            *rows,
            "",
            f"`task:CORE|tasks:{len(centred)}|items:{self.items or 'all'}|baselines:{name}|"
            f"gptjax:{importlib.metadata.version('gptjax')}`",
        ]
        return Result("CORE", values, "\n".join(markdown), tuple(records))

    def tasks(self) -> list[CoreTask]:
        """Tasks of the bundle. Raises UserError for files that are absent or of another form."""
        try:
            import yaml
        except ImportError:
            raise UserError("bundle: its core.yaml needs PyYAML; pip install pyyaml") from None
        folder, known = Path(self.bundle), self._baselines()
        try:
            listed = yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]
            tasks = [
                CoreTask(
                    task["label"],
                    task["icl_task_type"],
                    folder / "eval_data" / task["dataset_uri"],
                    task["num_fewshot"][0],
                    task.get("continuation_delimiter", " "),
                    known[task["label"]],
                )
                for task in listed
            ]
        except (OSError, LookupError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"bundle: got {folder}, whose core.yaml cannot be read ({error!r:.100})") from None
        for task in tasks:
            if task.kind not in FIELDS:
                raise UserError(f"bundle: task {task.label} is of kind {task.kind}, must be {', '.join(FIELDS)}")
        if not tasks:
            raise UserError(f"bundle: got {folder}, whose core.yaml has no tasks")
        return tasks

    def baseline_name(self) -> str:
        """Name of the baselines: "v1", DCLM's first, or a digest of others."""
        known = self._baselines()
        shared = V1.keys() & known.keys()
        if shared == V1.keys() and all(math.isclose(known[name], V1[name] / 100) for name in shared):
            return "v1"
        return digest(sorted(known.items()))[:8]

    def _baselines(self) -> dict[str, float]:
        file = Path(self.baselines) if self.baselines is not None else Path(self.bundle) / "eval_meta_data.csv"
        try:
            with file.open(encoding="utf-8", newline="") as rows:
                return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(rows)}
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"baselines: {file} cannot be read ({error!r:.100})") from None

    def _read(self, task: CoreTask) -> list[Item]:
        """Items in nanochat's order. Raises UserError, with file and line, for one that lacks a field."""
        items = []
        try:
            with task.file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    items.append(item := json.loads(line))
                    for name, kind in FIELDS[task.kind].items():
                        if not isinstance(item, dict) or not isinstance(item.get(name), kind):
                            raise UserError(f"bundle: {task.file}:{number} has no {name}, must be {kind.__name__}")
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"bundle: {task.file} cannot be read ({error})") from None
        random.Random(1337).shuffle(items)
        items = items[: self.items]
        if len(items) <= task.shots:
            raise UserError(f"bundle: {task.file} has {len(items)} items, must be more than its {task.shots} examples")
        return items


def _centred(accuracy: float, baseline: float) -> float:
    return (accuracy - baseline) / (1 - baseline)


def _half_width(centred: Any) -> float:
    """Half of the 95 % interval of the mean of independent centred accuracies: 1.96 sqrt(sum of squared errors) / n."""
    variances = [i.mean * (1 - i.mean) / i.n / (1 - baseline) ** 2 for _, baseline, i in centred]
    return 1.96 * math.sqrt(sum(variances)) / len(variances)


def _right(model: Any, task: CoreTask, pool: Sequence[Item], items: Sequence[Item]) -> list[float]:
    """1 for each item that the model gets right, else 0. pool: items that examples are drawn from."""
    groups = [_requests(task, pool, i, model.tokenizer, item) for i, item in enumerate(items)]
    limit = model.max_length or sys.maxsize
    # nanochat cuts texts to the context, their last token included, which need not be read.
    asked = [cut(request, limit - 1) for group in groups for request in group if request.ids]
    scored = iter(score(model.config, model.params, asked, model.rules))
    found = []
    for item, group in zip(items, groups, strict=True):
        results = [next(scored) if request.ids else None for request in group]
        found.append(float(_is_right(task.kind, item, results)))
    return found


def _is_right(kind: str, item: Item, results: Sequence[Likelihood | None]) -> bool:
    if kind == "language_modeling":
        return results[0] is not None and results[0].greedy
    losses = [math.nan if result is None else -result.logprob / result.tokens for result in results]
    return losses.index(min(losses)) == item["gold"]


def _requests(
    task: CoreTask, pool: Sequence[Item], i: int, tokenizer: Tokenizer, item: Item | None = None
) -> list[Continuation]:
    """Token ids of item `i` of the pool, or of an item in its place: a continuation of each choice, or the one."""
    item = pool[i] if item is None else item
    others = [j for j in range(len(pool)) if j != i]
    shown = [pool[j] for j in random.Random(1234 + i).sample(others, task.shots)] if task.shots else []
    d = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{e['query']}{d}{e['choices'][e['gold']]}\n\n" for e in shown)
        texts = [f"{before}{item['query']}{d}{choice}" for choice in item["choices"]]
    elif task.kind == "schema":
        before = "".join(f"{e['context_options'][e['gold']]}{d}{e['continuation']}\n\n" for e in shown)
        texts = [f"{before}{context}{d}{item['continuation']}" for context in item["context_options"]]
    else:
        before = "".join(f"{e['context'].strip()}{d}{e['continuation']}\n\n" for e in shown)
        context = f"{before}{item['context'].strip()}{d}"
        texts = [context.strip(), context + item["continuation"]]
    if (first := tokenizer.eos if tokenizer.bos is None else tokenizer.bos) is None:
        raise UserError("tokenizer: got one without bos and eos, must have one: CORE's prompts begin with it")
    ids = [(first, *encoded) for encoded in tokenizer.encode_batch(texts)]
    if task.kind == "schema":
        common = _common([each[::-1] for each in ids])
        starts = [len(each) - common for each in ids]
    else:
        starts = [_common(ids)] * len(ids)
    if task.kind == "language_modeling":
        ids, starts = ids[1:], starts[1:]
    return [Continuation(each[:start], each[start:]) for each, start in zip(ids, starts, strict=True)]


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    """Length of the common prefix."""
    return next(
        (n for n, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1),
        min(map(len, sequences)),
    )
