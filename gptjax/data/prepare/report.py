"""Report of a cleaning: for each step, documents in and out, counts by reason, and examples. As JSON and Markdown."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.prepare.steps import Table

EXAMPLES = 3
"""Examples of each reason of a step: the first ones."""
PRIVATE = "(not shown)"
"""In place of texts that a report must not have."""
WIDTH = 160
"""Characters of a text that an example shows."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A document that a step dropped or changed."""

    before: str
    after: str | None = None
    """None: the document was dropped."""

    @classmethod
    def of(cls, before: str, after: str | None = None) -> Example:
        """The beginning of a document, or the place of its first change."""
        if after is None:
            return cls(_clipped(before))
        pairs = zip(before, after, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
        start = max(0, at - WIDTH // 4)
        return cls(_clipped(before[start:]), _clipped(after[start:]))


@dataclasses.dataclass
class StepReport:
    """Counts of one step."""

    name: str
    documents: int = 0
    """Documents that reached the step."""
    kept: int = 0
    changed: int = 0
    characters: int = 0
    """Characters of the documents that it kept."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Documents by reason."""
    edits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Changes by reason."""
    examples: dict[str, list[Example]] = dataclasses.field(default_factory=dict)

    def keep(self, before: str, after: str, reasons: Mapping[str, int] | None = None, private: bool = False) -> None:
        """Count a document that is kept."""
        self.documents += 1
        self.kept += 1
        self.characters += len(after)
        if after != before:
            self.changed += 1
            for reason, count in (reasons or {"changed": 1}).items():
                self.edits[reason] = self.edits.get(reason, 0) + count
                example = Example.of(before, after)
                self._show(reason, dataclasses.replace(example, before=PRIVATE) if private else example)

    def drop(self, text: str, reason: str) -> None:
        """Count a document that is dropped."""
        self.documents += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._show(reason, Example.of(text))

    def _show(self, reason: str, *examples: Example) -> None:
        shown = self.examples.setdefault(reason, [])
        shown += examples[: EXAMPLES - len(shown)]

    def add(self, later: StepReport) -> None:
        """Add the counts of later documents."""
        for name in ("documents", "kept", "changed", "characters"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for mine, theirs in ((self.dropped, later.dropped), (self.edits, later.edits)):
            mine.update(collections.Counter(mine) + collections.Counter(theirs))
        for reason, examples in later.examples.items():
            self._show(reason, *examples)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StepReport:
        examples = {reason: [Example(**example) for example in found] for reason, found in data["examples"].items()}
        return cls(**{**data, "examples": examples})


@dataclasses.dataclass
class Report:
    """Counts of all steps, in their order."""

    documents: int
    characters: int
    """Characters of the documents that were read."""
    steps: list[StepReport]
    tables: list[Table]

    @property
    def kept(self) -> int:
        """Documents that all steps kept."""
        return self.steps[-1].kept if self.steps else self.documents

    def to_json(self) -> dict[str, Any]:
        tables = [table._asdict() for table in self.tables]
        return {
            "documents": self.documents,
            "characters": self.characters,
            "kept": self.kept,
            "steps": [step.to_json() for step in self.steps],
            "tables": tables,
        }

    def markdown(self) -> str:
        share = self.kept / max(1, self.documents)
        lines = ["# Cleaning", "", f"{self.kept:,} of {self.documents:,} documents are kept ({share:.1%}).", ""]
        rows = [("read", self.documents, "", "", self.characters)]
        rows += [(s.name, s.kept, s.documents - s.kept, s.changed, s.characters) for s in self.steps]
        lines += _table(("step", "kept", "dropped", "changed", "characters"), rows)
        for step in self.steps:
            if step.dropped or step.edits:
                lines += ["", f"## {step.name}", ""]
                counts = sorted(step.dropped.items(), key=lambda item: -item[1])
                rows = [(reason, "dropped", count) for reason, count in counts]
                rows += [(reason, "changed", count) for reason, count in step.edits.items()]
                lines += [*_table(("reason", "", "number"), rows), ""]
                for reason, examples in step.examples.items():
                    lines += [f"- {reason}: {_shown(example)}" for example in examples]
        for table in self.tables:
            lines += ["", f"## {table.title}", "", *_table(table.columns, table.rows)]
        return "\n".join(lines) + "\n"


def _clipped(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _shown(example: Example) -> str:
    before = _code(example.before)
    return before if example.after is None else f"{before} → {_code(example.after)}"


def _code(text: str) -> str:
    """The text as Markdown code on one line."""
    return f"`` {' ⏎ '.join(text.split(chr(10))).replace('``', '` `') or ' '} ``"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    numbers = [all(isinstance(row[i], int | float) or row[i] == "" for row in rows) for i in range(len(columns))]
    marks = ("---:" if number else "---" for number in numbers)
    return [_row(columns), f"|{'|'.join(marks)}|", *map(_row, rows)]


def _row(values: Sequence[Any]) -> str:
    cells = (f"{v:,}" if isinstance(v, int) else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ⏎ ') for cell in cells)} |"
