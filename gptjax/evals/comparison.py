"""A comparison of models by judges: a folder with the replies of each model and the votes on them.

    FOLDER/models.json          the path and settings of each model
    FOLDER/replies/NAME.jsonl   {"item": ..., "prompt": [messages], "reply": ...} of each prompt
    FOLDER/votes.jsonl          one `Vote` a line, appended as they come
    FOLDER/report.md            ratings, agreement and biases

Judges do not learn which model wrote what: the sides are drawn for each judge, prompt and pair of models. All judges
begin with the same pairs of replies, so that their agreement is known early, and go on in orders of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.data.chat import Conversation, conversation
from gptjax.data.files import read_json
from gptjax.evals import ratings
from gptjax.evals.ratings import Choice, Vote
from gptjax.io import atomic
from gptjax.types import Json, UserError

SHARED = 20
"""Number of pairs of replies with which every judge begins."""


def item_of(prompt: Conversation) -> str:
    """Name of a prompt: a digest of its messages."""
    said = json.dumps([message.as_json() for message in prompt], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def read_prompts(path: Path) -> dict[str, Conversation]:
    """Prompts by name: a text file with one per line, or JSON lines with a "prompt" (a text) or "messages". Raises
    UserError, naming file and line."""
    prompts: dict[str, Conversation] = {}
    for prompt, _ in _prompts(path):
        prompts[item_of(prompt)] = prompt
    if not prompts:
        raise UserError(f"prompts: got {path}, which has none, must have at least one")
    return prompts


def read_replies(path: Path) -> dict[str, str]:
    """Replies by the name of their prompt, of JSON lines that have a "reply" beside the prompt. Raises UserError."""
    replies = {}
    for prompt, row in _prompts(path):
        if not isinstance(row, dict) or not isinstance(row.get("reply"), str):
            raise UserError(f'models: {path}: got a line without a text in "reply", must have one beside its "prompt"')
        replies[item_of(prompt)] = row["reply"]
    return replies


def _prompts(path: Path) -> Iterator[tuple[Conversation, Any]]:
    """Each prompt and the row that it was in."""
    if path.suffix not in (".jsonl", ".json"):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"prompts: got {path}, which is not UTF-8, must be text") from None
        yield from ((conversation([{"role": "user", "content": line}]), line) for line in lines if line.strip())
        return
    for where, row in read_json(path, "error"):
        said = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
        if isinstance(said, str):
            said = [{"role": "user", "content": said}]
        if not isinstance(said, list) or not said:
            raise UserError(f'prompts: {where}: got no prompt, must have a text in "prompt", or a list in "messages"')
        try:
            messages = conversation(said)
        except UserError as error:
            raise UserError(f"prompts: {where}: {error}") from None
        while messages and messages[-1].role == "assistant":  # of a file of whole conversations
            messages = messages[:-1]
        if not messages:
            raise UserError(f"prompts: {where}: got only messages of the assistant, must end with another's")
        yield messages, row


@dataclasses.dataclass(frozen=True)
class Unit:
    """Two replies to compare."""

    item: str
    pair: tuple[str, str]

    def sides(self, judge: str) -> tuple[str, str]:
        """The models on the left and on the right, drawn for this judge."""
        return self.pair if _digest("sides", judge, self.item, *self.pair)[0] % 2 else (self.pair[1], self.pair[0])


class Comparison:
    """The replies of models to the same prompts, and the votes on them. Its methods may be called from any thread.

    folder   where it is kept
    prompts  by name
    models   names of at least two models
    """

    def __init__(self, folder: Path, prompts: Mapping[str, Conversation], models: Sequence[str]):
        if len(set(models)) < 2 or len(set(models)) < len(models):
            raise UserError(f"models: got {', '.join(models)}, must be at least two of different names")
        self.folder, self.prompts, self.models = folder, dict(prompts), tuple(models)
        self.replies: dict[str, dict[str, str]] = {model: {} for model in models}
        self.votes: list[Vote] = []
        self._lock = threading.Lock()
        (folder / "replies").mkdir(parents=True, exist_ok=True)
        for model in models:
            if (path := self._replies_file(model)).exists():
                atomic.drop_partial_line(path)
                self.replies[model] = {item: reply for item, reply in read_replies(path).items() if item in prompts}
        if (votes := folder / "votes.jsonl").exists():
            atomic.drop_partial_line(votes)
            self.votes = [_vote(where, row) for where, row in read_json(votes, "error")] if votes.stat().st_size else []

    def bind(self, model: str, facts: Mapping[str, Any]) -> None:
        """Note what a model's replies are made from. Raises UserError if there are some of something else."""
        path = self.folder / "models.json"
        known = json.loads(path.read_bytes()) if path.exists() else {}
        if self.replies[model] and known.get(model) != facts:
            raise UserError(
                f"out: got {self.folder}, whose replies of {model} are made from {known.get(model)}, not from {facts}; "
                "choose another folder, or another name as NAME=PATH"
            )
        atomic.write_text(path, json.dumps({**known, model: facts}, indent=1))

    def missing(self, model: str) -> dict[str, Conversation]:
        """Prompts that a model has not replied to."""
        return {item: prompt for item, prompt in self.prompts.items() if item not in self.replies[model]}

    def add_reply(self, model: str, item: str, reply: str) -> None:
        """Keep a reply, at once."""
        prompt = [message.as_json() for message in self.prompts[item]]
        with self._lock:
            _append(self._replies_file(model), {"item": item, "prompt": prompt, "reply": reply})
            self.replies[model][item] = reply

    def units(self, judge: str) -> list[Unit]:
        """All pairs of different replies, in the order of a judge. Pairs of equal replies are not shown."""
        pairs = [(min(pair), max(pair)) for pair in itertools.combinations(self.models, 2)]
        units = [Unit(item, pair) for item in self.prompts for pair in pairs if self._differ(item, pair)]
        units.sort(key=lambda unit: _digest("order", unit.item, *unit.pair))
        rest = sorted(units[SHARED:], key=lambda unit: _digest("order", judge, unit.item, *unit.pair))
        return units[:SHARED] + rest

    def _differ(self, item: str, pair: tuple[str, str]) -> bool:
        a, b = (self.replies[model].get(item) for model in pair)
        return a is not None and b is not None and a != b

    def add_vote(self, vote: Vote) -> None:
        """Keep a vote, at once. A later one of the same judge on the same sides replaces it."""
        with self._lock:
            _append(self.folder / "votes.jsonl", dataclasses.asdict(vote))
            self.votes.append(vote)

    def chosen(self, judge: str) -> dict[Unit, Choice]:
        """The choices of a judge."""
        return {Unit(vote.item, vote.pair): vote.choice for vote in self.votes if vote.judge == judge}

    def report(self) -> str:
        """Ratings, agreement and biases, as Markdown. Raises UserError without votes."""
        votes = [vote for vote in self.votes if vote.item in self.prompts and set(vote.pair) <= set(self.models)]
        votes = ratings.latest(votes)
        found = ratings.verdicts(votes)
        asked = {(vote.item, vote.pair) for vote in votes}
        equal = sum(
            self.replies[a].get(item) == self.replies[b].get(item) is not None
            for item in self.prompts
            for a, b in itertools.combinations(self.models, 2)
        )
        judges = sorted({vote.judge for vote in votes})
        lines = [
            f"# {' against '.join(self.models)}\n",
            f"Verdicts: {len(found):,}. Judges: {len(judges)}. Pairs of replies: {len(asked):,}, to "
            f"{len({vote.item for vote in votes}):,} prompts. Equal pairs, which are not shown: {equal:,}.\n",
            "| model | rating | 95 % interval | won | verdicts |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in ratings.ratings(found):
            interval = f"{row.low:.0f} to {row.high:.0f}"
            lines.append(f"| {row.model} | {row.rating:.0f} | {interval} | {row.wins:g} | {row.verdicts} |")
        lines.append("\nRatings are Bradley-Terry strengths on Elo's scale, mean 1,000; a tie is half a win.\n")
        for a, b in sorted({verdict.pair for verdict in found}):
            lines.append(f"- {a} is preferred to {b}: {ratings.win_rate(found, a, b):.1%}")
        alpha = ratings.agreement(found)
        lines.append(
            "- Agreement of judges: "
            + ("no pair of replies has two judges" if alpha is None else f"Krippendorff's alpha {alpha:.2f}")
        )
        length = {(item, model): len(text) for model, of in self.replies.items() for item, text in of.items()}
        for name, by_judges in _sorts(judges):
            mine = [vote for vote in votes if by_judges(vote.judge)]
            for bias, share in (
                ("the left or first reply", ratings.left_share(mine)),
                ("the longer reply", ratings.longer_share(mine, length)),
            ):
                if share is not None:
                    lines.append(f"- {name} prefer {bias}: {share:.1%}")
        return "\n".join(lines) + "\n"

    def _replies_file(self, model: str) -> Path:
        return self.folder / "replies" / f"{model}.jsonl"


MODEL_JUDGE = "model:"
"""Beginning of the name of a judge that is a model."""


def _sorts(judges: Iterable[str]) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Sorts of judges, with a test of the name."""
    names = list(judges)
    if any(not name.startswith(MODEL_JUDGE) for name in names):
        yield "People", lambda name: not name.startswith(MODEL_JUDGE)
    for name in names:
        if name.startswith(MODEL_JUDGE):
            yield f"Votes of {name.removeprefix(MODEL_JUDGE)}", name.__eq__


def _vote(where: Any, row: Json) -> Vote:
    fields = [field.name for field in dataclasses.fields(Vote)]
    if not isinstance(row, dict) or sorted(row) != sorted(fields) or not all(isinstance(row[f], str) for f in fields):
        raise UserError(f"out: {where}: got a line that is no vote, must have the texts {', '.join(fields)}")
    return Vote(**row)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    atomic.append_line(path, json.dumps(row, ensure_ascii=False))


def _digest(*words: str) -> bytes:
    return hashlib.sha256(json.dumps(words).encode()).digest()
