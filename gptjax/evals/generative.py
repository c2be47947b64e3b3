"""Generative evaluation: a model writes replies to the prompts of a task, and the task scores them.

    evaluation = Generative(tasks.Gsm8k("gsm8k/test.jsonl"), items=200)
    evaluation(lm).values["accuracy"]
    evaluation.run(lm, "evals/gsm8k.jsonl")       # keeps each reply as it is scored; the same command again resumes

Replies come from the engine and are scored in other processes meanwhile. Every reply ends in one of several ways, which
are counted apart: right or wrong, no answer found, cut off, timed out, failed.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from gptjax.config import digest, to_json
from gptjax.data import chat
from gptjax.data.chat import ConversationTemplate
from gptjax.distributed import processes
from gptjax.evals import intervals
from gptjax.evals.best_of import expected_outcome, kl_bound
from gptjax.evals.replies import Form, Prompt, Written, form_of, prompts, write
from gptjax.evals.reply_file import Record, ReplyFile
from gptjax.inference.sampling import Sampling
from gptjax.protocols import Evaluation, Reward, Tokenizer
from gptjax.tasks.functions import ChatTools, check_tools
from gptjax.tasks.scorers import Scorers
from gptjax.tasks.task import Generation, Reply, Score, Task
from gptjax.tasks.tools import Tool
from gptjax.types import Result, UserError

Progress = Callable[[int, int, float], None]
"""Function of the number of scored replies, of all, and the mean outcome so far."""
CHECKED = 8
"""Number of items whose right replies must score 1 before anything else is done."""
COUNTS: tuple[str, ...] = (
    "right",
    "partly right",
    "wrong",
    "not found",
    "cut off",
    "too long",
    "timed out",
    "failed",
)
"""Ends of a reply."""
SHOWN = 3
"""Number of replies in the Markdown."""


@dataclasses.dataclass(frozen=True)
class Generative(Evaluation):
    """Score of a model's replies to a task: `Generative(task)(language_model) -> Result`.

    An encoder-decoder reads `task.text(i)`, as in training with `tasks.TaskPairs`, and its targets are greedy."""

    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder-decoder")

    task: Task
    """Task with prompts and scores: `tasks.Gsm8k`, ..."""
    items: int | None = None
    """Number of items, the first of the task. None: all."""
    samples: int = 1
    """Replies to each item. More than one also give pass@k, the probability that one of k is right."""
    sampling: Sampling = Sampling(temperature=0.0)
    """Sampling settings. The default is greedy."""
    max_tokens: int | None = None
    """Maximum length of a reply, in tokens. None: the task's."""
    seed: int = 0
    """Random seed of the replies."""
    form: Form | None = None
    """Form of the prompts: "chat", the model's conversation format, or "text", to be continued. None: "chat" if the
    model has a template or the chat markers, else "text"."""
    tools: tuple[Tool, ...] | ChatTools = ()
    """Tools that answer in the middle of a reply, `(tasks.Calculator(),)`, or in a conversation, `tasks.ChatTools`."""
    chooser: Reward | None = None
    """Rewards by which the best of k samples is chosen, such as `models.reward.RewardModel("runs/reward")`; best@k is
    its mean outcome. None: the task's own."""
    rows: int = 16
    """Number of replies that are written at a time."""
    workers: int = 2
    """Number of processes that score."""
    timeout: float = 30.0
    """Seconds that a score may take."""

    def __post_init__(self) -> None:
        for name in ("items", "samples", "max_tokens", "rows", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: got {value}, must be at least 1")
        if self.form not in (None, "chat", "text"):
            raise UserError(f"form: got {self.form!r}, must be chat or text")
        check_tools(self.tools, self.form)
        if self.samples > 1 and self.sampling.greedy:
            raise UserError(
                f"samples: got {self.samples} at temperature 0, where all are the same; must be 1, or set a temperature"
            )

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UserError for a task without items, one whose own right replies do not score 1, and a tokenizer that
        cannot write the prompts."""
        chosen = self._chosen()
        some = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, min(CHECKED, len(chosen)), dtype=int))]
        with Scorers(self.task, 1, self.timeout) as scorers:
            replies = [self.task.example(i)[-1].text for i in some]
            futures = [scorers.submit(i, Reply(reply)) for i, reply in zip(some, replies, strict=True)]
            for i, reply, future in zip(some, replies, futures, strict=True):
                score = future.result()
                if score.outcome != 1:
                    found = f" ({score.note})" if score.note else ""
                    raise UserError(
                        f"task: {self.task.name} gives its own right reply to item {i}, {reply[-60:]!r}, "
                        f"{score.outcome:g}, {score.status}{found}; must be 1"
                    )
        converses = self.form == "chat" or (self.form is None and "<|assistant|>" in tokenizer.specials)
        for i in some:
            messages, texts = self.task.prompt(i), [self.task.text(i)]
            if converses:
                chat.prompt(messages, tokenizer)
                texts = [message.text for message in messages]
            for text in texts:
                if "".join(tokenizer.decode(tokenizer.encode(text)).split()) != "".join(text.split()):
                    raise UserError(f"task: {self.task.name}: the tokenizer cannot write the prompt of item {i}")

    def check_chat(self, tokenizer: Tokenizer, template: ConversationTemplate | None) -> None:
        if self.form == "text":
            return
        if isinstance(self.tools, ChatTools):
            from gptjax.train.turns import Turns

            Turns.of(self.tools, tokenizer, template).check(self.tools.offered(self.task.prompt(0)))
        if template is not None:
            for i in self._chosen()[:CHECKED]:
                template.prompt(self.task.prompt(i), tokenizer)

    def __call__(self, model: Any) -> Result:
        return self.run(model)

    def run(self, model: Any, path: str | Path | None = None, progress: Progress | None = None, of: str = "") -> Result:
        """Evaluate a language model.

        path      file of JSON lines for the scored replies. One of the same evaluation, model and prompts is resumed;
                  another raises UserError
        progress  called after every reply
        of        identity of the model, for the file
        """
        form = self.form or form_of(model)
        check_tools(self.tools, form)
        asked = prompts(model, self.task, self._chosen(), form, self.tools)
        signature = self.signature(form, asked)
        store = ReplyFile(None if path is None else Path(path), {"signature": signature, "model": of})
        records = _by_reply(processes.on_first(store.read))
        left = [(p, s) for p in asked for s in range(self.samples) if (p.item, s) not in records]
        if left:
            written = write(model, left, self._generation(), self.sampling, form, self.seed, self.rows, self.tools)
            if jax.process_index() == 0:
                self._score(written, store, records, len(asked) * self.samples, progress)
            else:
                collections.deque(written, maxlen=0)  # all processes of a job run the engine's programs
            records = _by_reply(processes.on_first(lambda: [*records.values()]))
        return self._result([records[p.item, s] for p in asked for s in range(self.samples)], signature, form)

    def signature(self, form: Form, asked: Sequence[Prompt]) -> str:
        """All that a figure depends on but the model, as "name:value|name:value": figures of two signatures are not to
        be compared."""
        told = [[m.as_json() for m in p.messages] if form == "chat" else self.task.text(p.item) for p in asked]
        generation, sampling = self._generation(), {k: v for k, v in to_json(self.sampling).items() if k != "class"}
        default = dataclasses.asdict(Sampling())
        values = {
            "task": self.task.name,
            "version": self.task.version,
            "data": self.task.fingerprint()[:12],
            **dict(_flat(to_json(self.task), "task.")),
            **({"scorer": self.task.scorer} if self.task.scorer else {}),
            "form": form,
            "prompts": digest(told)[:12],
            "items": len(asked),
            "samples": self.samples,
            "max_tokens": generation.max_tokens,
            "stop": json.dumps(generation.stop if form == "chat" else generation.text_stop),
            **{k: v for k, v in sampling.items() if k == "temperature" or v != default[k]},
            **({"tools": ", ".join(map(repr, self._tools))} if self.tools else {}),
            **({"chooser": self.chooser.fingerprint()[:12]} if self.chooser else {}),
            "seed": self.seed,
            "gptjax": importlib.metadata.version("gptjax"),
        }
        return "|".join(f"{name}:{value}" for name, value in values.items())

    def _chosen(self) -> range:
        count = len(self.task)
        if not count:
            raise UserError(f"task: {self.task.name} has no items, must have at least one")
        return range(min(count, self.items or count))

    @property
    def _tools(self) -> tuple[Tool | ChatTools, ...]:
        return (self.tools,) if isinstance(self.tools, ChatTools) else self.tools

    def _generation(self) -> Generation:
        generation = self.task.generation
        return dataclasses.replace(generation, max_tokens=self.max_tokens or generation.max_tokens)

    def _score(
        self,
        written: Iterator[Written],
        store: ReplyFile,
        records: dict[tuple[int, int], Record],
        count: int,
        progress: Progress | None,
    ) -> None:
        """Add scored replies to the records, of which there will be `count`, and to the store."""
        total = 0.0 + sum(record["outcome"] for record in records.values())
        with store, Scorers(self.task, self.workers, self.timeout) as scorers:
            for record in self._records(written, scorers):
                records[record["item"], record["sample"]] = record
                store.add(record)
                total += record["outcome"]
                if progress is not None:
                    progress(len(records), count, total / len(records))

    def _records(self, replies: Iterator[Written], scorers: Scorers) -> Iterator[Record]:
        """Scored replies, as they come."""
        scoring: collections.deque[tuple[Written, Future[Score]]] = collections.deque()
        for written in replies:
            if written.fits:
                scoring.append((written, scorers.submit(written.prompt.item, written.reply)))
            else:
                yield self._record(written, Score(0.0, status="too long"))
            while scoring and scoring[0][1].done():
                written, future = scoring.popleft()
                yield self._record(written, future.result())
        for written, future in scoring:
            yield self._record(written, future.result())

    def _record(self, written: Written, score: Score) -> Record:
        item = written.prompt.item
        return {
            "item": item,
            "sample": written.sample,
            "cluster": self.task.cluster(item),
            "prompt": [message.as_json() for message in written.prompt.messages],
            "reply": written.reply.text,
            "finished": written.reply.finished,
            "tokens": written.tokens,
            **({"turns": [turn.as_json() for turn in turns]} if (turns := written.reply.turns) else {}),
            **({"tool_calls": written.calls, "tool_errors": written.errors} if self.tools else {}),
            **dataclasses.asdict(score),
        }

    def _result(self, records: Sequence[Record], signature: str, form: Form) -> Result:
        outcomes, clusters = [r["outcome"] for r in records], [r["cluster"] for r in records]
        figure = intervals.mean(outcomes, clusters)
        name = self.task.figure
        values = {name: figure.mean, f"{name}_low": figure.low, f"{name}_high": figure.high}
        rows = [(name, f"{figure:.1%}")]
        parts = {part for record in records for part in record["parts"]}
        for part in sorted(parts):
            interval = intervals.mean([r["parts"].get(part, 0.0) for r in records], clusters)
            values[part] = interval.mean
            rows.append((part, f"{interval:.1%}"))
        for k in _powers(self.samples):
            interval = self._pass_at(records, k)
            values[f"pass@{k}"] = interval.mean
            rows.append((f"pass@{k}", f"{interval:.1%}"))
        ranked = self.samples > 1 and (self.chooser is not None or self.task.graded)
        rewards = self._rewards(records) if ranked else ()
        for k in _powers(self.samples) if ranked else ():
            interval = self._best_of(records, rewards, k)
            values[f"best@{k}"] = interval.mean
            rows.append((f"best@{k}, KL at most {kl_bound(k):.2f}", f"{interval:.1%}"))
        by_item: dict[int, list[str]] = {}
        for record in records:
            by_item.setdefault(record["item"], []).append(record["reply"])
        for part, value in self.task.figures(by_item).items():
            values[part] = value
            rows.append((part, f"{value:.4g}"))
        counts = _counts(records)
        values |= {"items": len(by_item), "clusters": figure.clusters, "replies": len(records)}
        values |= {status.replace(" ", "_"): count for status, count in counts.items()}
        table = ["| figure | mean, 95 % interval |", "|---|---|", *(f"| {n} | {text} |" for n, text in rows)]
        how = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count)
        markdown = [*table, "", f"Replies: {how}.", "", f"Signature: `{signature}`", *_shown(records)]
        if self._tools:
            values |= {name: sum(r[name] for r in records) / len(records) for name in ("tool_calls", "tool_errors")}
        tools = "".join(f", with {type(tool).__name__}" for tool in self._tools)
        return Result(self.task.name + tools, values, "\n".join(markdown), tuple(records))

    def _pass_at(self, records: Sequence[Record], k: int) -> intervals.Interval:
        """Probability that one of k replies is right, unbiased (Chen et al. 2021, arXiv:2107.03374)."""
        right: dict[int, int] = collections.Counter()
        for record in records:
            right[record["item"]] += record["outcome"] == 1
        clusters = [self.task.cluster(item) for item in right]
        return intervals.mean([pass_at(self.samples, count, k) for count in right.values()], clusters)

    def _best_of(self, records: Sequence[Record], rewards: Sequence[float], k: int) -> intervals.Interval:
        """Outcome of the best of k replies."""
        by_item: dict[int, list[tuple[float, float]]] = {}
        for record, reward in zip(records, rewards, strict=True):
            by_item.setdefault(record["item"], []).append((record["outcome"], reward))
        clusters = [self.task.cluster(item) for item in by_item]
        outcomes = [expected_outcome([o for o, _ in pairs], [r for _, r in pairs], k) for pairs in by_item.values()]
        return intervals.mean(outcomes, clusters)

    def _rewards(self, records: Sequence[Record]) -> Sequence[float]:
        """Reward of each reply; 0 if there is none, as the prompt is too long."""
        if (chooser := self.chooser) is None:
            return [record["value"] for record in records]
        told = [record for record in records if record["status"] != "too long"]
        turns = [(*r.get("turns", ()), {"role": "assistant", "content": r["reply"]}) for r in told]
        said = [(*self.task.prompt(r["item"]), *chat.conversation(t)) for r, t in zip(told, turns, strict=True)]
        found = chooser(said) if chooser.collective else processes.on_first(lambda: [*chooser(said)])
        rewards = iter(found)
        return [0.0 if record["status"] == "too long" else next(rewards) for record in records]


def _by_reply(records: Sequence[Record]) -> dict[tuple[int, int], Record]:
    return {(record["item"], record["sample"]): record for record in records}


def pass_at(n: int, right: int, k: int) -> float:
    """1 - C(n - right, k) / C(n, k): probability that one of k is right, out of n of which so many are."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _powers(samples: int) -> list[int]:
    """1, 2, 4, ... and `samples`; none for one sample."""
    return [] if samples == 1 else sorted({*(1 << i for i in range(samples.bit_length())), samples})


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Names and values of the settings of a task, and of those in it."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in ("class", "path"):
            yield prefix + name, value


def _counts(records: Sequence[Record]) -> dict[str, int]:
    """Number of replies that ended in each way. They add up to all."""
    counts = dict.fromkeys(COUNTS, 0)
    for record in records:
        status = record["status"]
        if status == "scored":
            status = {0: "wrong", 1: "right"}.get(record["outcome"], "partly right")
        counts[status] += 1
    return counts


def _shown(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records[:SHOWN]:
        prompt, reply = record["prompt"][-1]["content"], record["reply"].strip() or "(nothing)"
        kind = record["status"] if record["status"] != "scored" else f"scored {record['outcome']:g}"
        lines += ["", f"Item {record['item']}, {kind}:", "", *_quote(prompt), ">", *_quote(f"Reply: {reply}")]
    return lines


def _quote(text: str) -> list[str]:
    return [f"> {line}" for line in text.strip().splitlines()]
