"""Synthetic data: a model's replies to prompts made from rows, filtered, as conversations or as texts.

    paraphrase        "Say the same in other words:\\n{text}", as texts
    back-translation  "Translate into Chinese:\\n{text}", as texts, and of these "Translate into English:\\n{text}"
    rejection         "{question}", several samples, those kept whose answer is right, as conversations

Every reply is written to a file beside the result as it comes, under a key of prompt, sample and settings: what is
there is not asked again, whatever changed in the rows or in the filter.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.data.prepare.steps import Document
from gptjax.io import atomic
from gptjax.types import UserError

Keep = Callable[[Mapping[str, Any], str], bool]
"""(row, reply) -> True if the reply is kept."""


class Asked(NamedTuple):
    """A prompt to answer."""

    key: str
    """SHA-256, in hex, of prompt, sample and settings."""
    prompt: str
    sample: int

    @property
    def seed(self) -> int:
        """Seed of the reply's draws, from 0 to 2^31 - 1."""
        return int(self.key[:8], 16) >> 1


class Replied(NamedTuple):
    """A reply."""

    key: str
    text: str
    finished: bool
    """False: cut off at its maximum length."""


Write = Callable[[Sequence[Asked]], Iterable[Replied]]
"""The model: replies to prompts, in any order."""


COLUMN = re.compile(r"\{(\w+)\}")
"""A column in a template."""


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """Prompts of rows, and the treatment of the replies."""

    prompt: str
    """Template of the prompt, with columns of the row in braces: "Paraphrase:\\n{text}"."""
    samples: int = 1
    """Replies to each prompt."""
    most: int | None = None
    """Maximum number of replies kept of a row, the first ones. None: all that are kept."""
    form: Literal["messages", "text"] = "messages"
    """Rows to write: conversations of prompt and reply in `messages`, or the reply in `text`."""

    def __post_init__(self) -> None:
        for name in ("samples", "most"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: got {value}, must be at least 1")
        if not COLUMN.search(self.prompt):
            raise UserError(
                f"prompt: got {self.prompt!r}, must have columns in braces, such as {{text}}: else all rows are alike"
            )

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises UserError for a column that it does not have."""

        def value(match: re.Match[str]) -> str:
            if match[1] not in row:
                raise UserError(f"prompt: got {match[0]}, must be a column: {', '.join(row)}")
            found = row[match[1]]
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

        return COLUMN.sub(value, self.prompt)


def synthesise(
    documents: Callable[[], Iterator[Document]],
    text: str,
    synthesis: Synthesis,
    settings: Any,
    write: Write,
    out: Path,
    keep: Keep = lambda row, reply: True,
) -> dict[str, int]:
    """Write the replies that are kept to `out`, as JSON lines in the order of the rows. Returns counts of replies by
    their treatment: kept, cut off, empty, repeated, refused by `keep`, or beyond `most`.

    text      column of the documents' text
    settings  value of JSON types that identifies the model and its sampling: part of every key
    """
    if out.exists():
        raise UserError(f"out: got {out}, which exists already; choose another file")

    def asked() -> Iterator[tuple[dict[str, Any], list[Asked]]]:
        for document in documents():
            row = {text: document.text, **document.fields}
            prompt = synthesis.fill(row)
            yield row, [Asked(_key(settings, prompt, n), prompt, n) for n in range(synthesis.samples)]

    log = out.with_name(out.name + ".replies")
    replies = _read(log)
    missing = {one.key: one for _, several in asked() for one in several if one.key not in replies}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        for reply in write([*missing.values()]) if missing else ():
            replies[reply.key] = reply
            file.write(json.dumps(reply._asdict(), ensure_ascii=False) + "\n")
            file.flush()
    counts: collections.Counter[str] = collections.Counter()
    with atomic.new(out) as partial, open(partial, "w", encoding="utf-8") as file:
        for row, several in asked():
            kept: list[str] = []
            for one in several:
                reply = replies[one.key]
                treatment = _treatment(row, reply, kept, keep, synthesis.most)
                counts[treatment] += 1
                if treatment == "kept":
                    kept.append(reply.text)
                    file.write(json.dumps(_row(row, one.prompt, reply.text, synthesis.form), ensure_ascii=False) + "\n")
        if not counts["kept"]:
            listed = ", ".join(f"{count} {treatment}" for treatment, count in sorted(counts.items())) or "no rows"
            raise UserError(f"keep: keeps no reply ({listed}); see {log}, or give max_tokens or another prompt")
    return dict(counts)


def _key(settings: Any, prompt: str, sample: int) -> str:
    return hashlib.sha256(json.dumps([settings, prompt, sample], sort_keys=True).encode()).hexdigest()


def _read(log: Path) -> dict[str, Replied]:
    """Replies that are there. A last line that was interrupted is removed."""
    if not log.exists():
        return {}
    whole = log.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if complete != whole:
        atomic.write_text(log, complete.decode())
    return {reply.key: reply for line in complete.splitlines() for reply in (Replied(**json.loads(line)),)}


def _treatment(row: Mapping[str, Any], reply: Replied, kept: Sequence[str], keep: Keep, most: int | None) -> str:
    if not reply.finished:
        return "cut off"
    if not reply.text.strip():
        return "empty"
    if reply.text in kept:
        return "repeated"
    if not keep(row, reply.text):
        return "refused"
    return "kept" if most is None or len(kept) < most else "beyond most"


def _row(row: dict[str, Any], prompt: str, reply: str, form: str) -> dict[str, Any]:
    if form == "text":
        return {**row, "text": reply}
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {**{name: value for name, value in row.items() if name != "messages"}, "messages": said}
