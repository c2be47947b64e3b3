"""`gptjax eval`: bits per byte of a text, scores of tasks, the evaluations of a run, and two models compared."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from gptjax.evals.generative import Generative
    from gptjax.evals.multiple_choice import MultipleChoice
    from gptjax.models.language_model import LanguageModel
    from gptjax.tasks import ChoiceTask, Task
    from gptjax.types import Result

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH [PATH]")]
Step = int | Literal["latest", "best"]
RED_TEAM = ("Refusal", "Jailbreak", "OverRefusal")
"""Tasks of the red-team report."""


def evaluate(
    paths: Paths,
    on: str | None = None,
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    shots: int = 0,
    samples: int = 1,
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    form: Literal["chat", "text", "likelihood"] | None = None,
    core: Path | None = None,
    red_team: bool = False,
    out: Path | None = None,
    step: Step = "latest",
) -> None:
    """Evaluate a model: on a text, on tasks, or with the evaluations of its run. Two models are compared item by item.

    Args:
        paths: Run folder, or a folder written by LanguageModel.save; or two of them, to be compared on --tasks.
        on: File for bits per byte and perplexity, beside `xz -9`: a text, or a table (.jsonl, .csv, .parquet) whose
            column "text" has a document in each row.
        tasks: Tasks and their files, gsm8k=test.jsonl,arc_easy=easy.jsonl: classes of gptjax.tasks by name, in any case
            and with or without _; your own as module:Class=FILE.
        limit: Number of items of each task, the first ones. None: all.
        shots: Number of examples before each question, drawn from the other items.
        samples: Replies to each item; more than one also give pass@k.
        temperature: Sampling temperature. None: 0, greedy, for one sample, else 1.
        max_tokens: Maximum length of a reply. None: the task's.
        seed: Random seed of replies and examples.
        form: Form of the prompts: the model's conversation format, or a text to be continued; or the likelihoods of a
            task's options, without a reply. None: chat if it can.
        core: Folder of DCLM's bundle, for CORE.
        red_team: Refusals, jailbreaks, over-refusals, words of abuse in the replies, and bias by names in one report.
        out: Folder for the report (Markdown, JSON) and every reply. The same command again resumes. None: only shown.
        step: Checkpoint of a run: latest, best (lowest validation loss), or a step.
    """
    from gptjax.inference import Sampling
    from gptjax.types import UserError

    if not 1 <= len(paths) <= 2:
        raise UserError(f"paths: got {len(paths)}, must be a model, or two to compare")
    if red_team:
        if form == "likelihood":
            raise UserError("form: got likelihood with --red_team, must be chat or text, as it reads replies")
        tasks = (*tasks, *RED_TEAM)
    if len(paths) == 2 and not tasks:
        raise UserError("tasks: got none with two models, must be those to compare them on")
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    sampling = Sampling(temperature=temperature)
    if form == "likelihood":
        from gptjax.evals import MultipleChoice

        evaluations = [MultipleChoice(_with_options(task), limit, shots, seed) for task in _tasks(tasks, 0, seed)]
    else:
        from gptjax.evals import Generative

        chosen = _tasks(tasks, shots, seed)
        evaluations = [Generative(task, limit, samples, sampling, max_tokens, seed, form) for task in chosen]
    names = _names(paths)
    results = {name: [] for name in names}
    for name, path in zip(names, paths, strict=True):
        model = _load(path, step)
        results[name] += _run_tasks(model, evaluations, path, step, None if out is None else out / name)
        if core is not None:
            from gptjax.evals import Core

            results[name].append(Core(str(core), limit)(model))
        if red_team:
            from gptjax.evals import NameBias

            results[name].append(NameBias()(model))
        if on is not None or not (tasks or core):
            results[name] += [evaluation(model) for evaluation in _of_text(model, path, on)]
    text = _report(results)
    print(text)
    if out is not None:
        _write(out, text, results)


def _run_tasks(
    model: LanguageModel,
    evaluations: Sequence[Generative | MultipleChoice],
    path: Path,
    step: Step,
    out: Path | None,
) -> list[Result]:
    """Results of tasks, with the progress of each on standard error."""
    from gptjax.evals import MultipleChoice
    from gptjax.io import atomic
    from gptjax.models.identity import content_digest

    found = []
    for evaluation in evaluations:  # all, before the first takes its time
        evaluation.check(model.tokenizer)
    of = f"{content_digest(path)[:16]}, step {step}" if evaluations and out is not None else ""
    for number, evaluation in enumerate(evaluations):
        name = evaluation.task.name
        file = None if out is None else out / f"{number}-{re.sub('[^A-Za-z0-9_-]+', '-', name)}.jsonl"
        if not isinstance(evaluation, MultipleChoice):
            found.append(evaluation.run(model, file, shown_progress(name), of))
            continue
        found.append(evaluation(model))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(file, "".join(json.dumps(dict(item)) + "\n" for item in found[-1].items))
    return found


def _with_options(task: Task) -> ChoiceTask:
    from gptjax.tasks import ChoiceTask
    from gptjax.types import UserError

    if not isinstance(task, ChoiceTask):
        raise UserError(f"form: got likelihood for {task.name}, must be chat or text: its items have no options")
    return task


def shown_progress(name: str) -> Callable[[int, int, float], None]:
    """Function that shows the progress of an evaluation on standard error."""
    last = -1

    def show(done: int, total: int, mean: float) -> None:
        nonlocal last
        percent = 100 * done // total
        if percent != last and (sys.stderr.isatty() or percent // 10 != last // 10):
            last = percent
            end = "\n" if done == total or not sys.stderr.isatty() else "\r"
            print(f"{name}: {done:,} of {total:,} replies, mean so far {mean:.1%}", end=end, file=sys.stderr)

    return show


def _tasks(given: Sequence[str], shots: int, seed: int) -> list[Task]:
    """Tasks of NAME=FILE, NAME or module:Class=FILE. Raises UserError for an unknown name or a missing file."""
    from gptjax.tasks import FewShot

    tasks = [parse_task(item.strip()) for word in given for item in word.split(",") if item.strip()]
    return [FewShot(task, shots, seed) if shots else task for task in tasks]


def parse_task(text: str) -> Task:
    """Task of NAME=FILE, NAME or module:Class=FILE. Raises UserError for an unknown name or a missing file."""
    from gptjax import tasks
    from gptjax.types import UserError

    name, _, path = text.partition("=")
    if ":" in name:
        module, _, attribute = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"tasks: got {name}, which cannot be imported ({error}); must be module:Class") from None
    else:
        classes = {n.lower(): c for n in tasks.__all__ if _is_task(c := getattr(tasks, n))}
        cls = classes.get(name.lower().replace("_", "").replace("-", ""))
        if cls is None:
            raise UserError(f"tasks: got {name!r}, must be one of {', '.join(sorted(classes))}, or module:Class")
    if not _is_task(cls):
        raise UserError(f"tasks: got {name}, must be a dataclass that is a gptjax.tasks.Task")
    fields = [field.name for field in dataclasses.fields(cls)]
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if needed not in ([], ["path"]):
        raise UserError(f"tasks: got {name}, which needs {', '.join(needed)}; use it from Python")
    if (needed and not path) or (path and "path" not in fields):
        raise UserError(f"tasks: got {text}, must be {name}{'=FILE' if needed else ''}")
    return cls(path=path) if path else cls()


def _is_task(cls: object) -> bool:
    from gptjax.tasks import Task

    return isinstance(cls, type) and issubclass(cls, Task) and dataclasses.is_dataclass(cls)


def _of_text(model: LanguageModel, path: Path, on: str | None) -> list[Any]:
    """Evaluations of a text, or those of the run."""
    from gptjax.config import from_json
    from gptjax.data import Text
    from gptjax.data.guess import TABLES
    from gptjax.evals import BitsPerByte
    from gptjax.types import UserError

    if on is not None:
        suffix = Path(on).with_suffix("").suffix if on.endswith(".gz") else Path(on).suffix
        source = TABLES[suffix](on, validation=0.0) if suffix in TABLES else Text(on, validation=0.0)
        return [BitsPerByte(source, split="train", length=model.max_length or 256)]
    file = path / "config.json"
    experiment = json.loads(file.read_text()).get("experiment") if file.exists() else None
    evaluations = [e for s in experiment["stages"].values() for e in s["evaluations"]] if experiment else []
    if not evaluations:
        raise UserError(f"on: got none, and {path} names no evaluation; give a text file with --on, or --tasks")
    return [from_json(evaluation) for evaluation in evaluations]


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of models in reports: their folders', or numbers before them if those are equal."""
    names = [Path(path).resolve().name for path in paths]
    return [f"{i}-{name}" for i, name in enumerate(names, 1)] if len({*names}) < len(names) else names


def _report(results: dict[str, list[Result]]) -> str:
    lines = []
    for name, found in results.items():
        heading = "#" if len(results) == 1 else "##"
        lines += [f"# {name}\n"] if len(results) > 1 else []
        for result in found:
            lines += [f"{heading} {result.title}\n", result.markdown, ""]
    if len(results) == 2:
        (a, of_a), (b, of_b) = results.items()
        lines += [f"# {a} minus {b}\n", "| task | difference of the means, 95 % interval | p |", "|---|---|---|"]
        lines += [_difference(one, other) for one, other in zip(of_a, of_b, strict=True) if one.items]
    return "\n".join(lines)


def _difference(a: Result, b: Result) -> str:
    """Row of a table: paired differences of the same items."""
    from gptjax.evals import intervals

    ours, theirs = ([item["outcome"] for item in result.items] for result in (a, b))
    found = intervals.difference(ours, theirs, [item["cluster"] for item in a.items])
    return f"| {a.title} | {found:+.1%} | {found.p:.3g} |"


def _write(out: Path, text: str, results: dict[str, list[Result]]) -> None:
    from gptjax.io import atomic

    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / "report.md", text + "\n")
    values = {name: [{"title": r.title, "values": r.values} for r in found] for name, found in results.items()}
    atomic.write_text(out / "report.json", json.dumps(values, indent=2) + "\n")


def _load(path: Path, step: Step) -> LanguageModel:
    from gptjax.models.loading import load

    return load(path, step=step)
