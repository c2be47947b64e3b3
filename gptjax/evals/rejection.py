"""Rejection sampling: of a model's replies to a task, those that the task rewards, as conversations to fine-tune on.

records = evals.Generative(task, samples=8, sampling=Sampling())(lm).items
rows, counts = rejection_sampled(task, records, most=2)          # of data.ChatJsonl, if written as JSON lines
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.chat import Message
from gptjax.tasks.task import Task
from gptjax.types import UserError


def rejection_sampled(
    task: Task, records: Sequence[Mapping[str, Any]], most: int | None = None, least: float = 1.0
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Conversations of prompt and kept reply, in the order of items and samples, and counts of replies by their
    treatment: kept, cut off, repeated, refused, or beyond most.

    records  scored replies of `evals.Generative`
    most     maximum number of replies kept of an item, the first ones. None: all
    least    outcome from which a reply is kept

    Raises UserError if none is kept."""
    if most is not None and most < 1:
        raise UserError(f"most: got {most}, must be at least 1")
    kept: dict[int, list[str]] = {}
    rows, counts = [], collections.Counter[str]()
    for record in sorted(records, key=lambda record: (record["item"], record["sample"])):
        item, reply = record["item"], record["reply"]
        before = kept.setdefault(item, [])
        treatment = (
            "cut off"
            if not record["finished"]
            else "repeated"
            if reply in before
            else "refused"
            if record["outcome"] < least
            else "kept"
            if most is None or len(before) < most
            else "beyond most"
        )
        counts[treatment] += 1
        if treatment == "kept":
            before.append(reply)
            messages = (*task.prompt(item), Message("assistant", reply))
            rows.append({"messages": [message.as_json() for message in messages], "item": item})
    if not rows:
        listed = ", ".join(f"{count} {treatment}" for treatment, count in sorted(counts.items())) or "no replies"
        raise UserError(f"least: got {least:g}, which keeps no reply ({listed}); give more samples or a lower one")
    return rows, dict(counts)
