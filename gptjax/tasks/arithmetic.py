"""Word problems with a number as the answer: GSM8K, and those of LLM-Adapters (MultiArith, AddSub, SVAMP, ...)."""

from __future__ import annotations

import dataclasses
import functools
import re
from decimal import Decimal
from typing import Literal

from gptjax.data.chat import Conversation, Message
from gptjax.data.files import Where, field
from gptjax.tasks import extract
from gptjax.tasks.rows import read_items
from gptjax.tasks.task import Generation, Reply, Score, Task, unanswered
from gptjax.types import Json, UserError

ASKED = '\n\nThink step by step. Write the answer as a number after "####" at the end.'
"""Form of the answer that the prompts ask for."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and its answer."""

    question: str
    solution: str
    """A right reply, which ends with "#### " and the answer."""
    answer: Decimal


@dataclasses.dataclass(frozen=True)
class WordProblems(Task):
    """Problems of a file. Base class.

    The outcome is the equality of numbers, 1,000 = 1000.0, by the extraction named in `extraction`; `parts` has both.
    Problems with the same question form a cluster."""

    path: str
    """File of the problems, a glob or a URL."""
    extraction: Literal["strict", "flexible"] = "strict"
    """Answer that counts: "strict", the one number after "####" or "the answer is"; "flexible", the last number."""

    def __post_init__(self) -> None:
        if self.extraction not in ("strict", "flexible"):
            raise UserError(f"extraction: got {self.extraction!r}, must be strict or flexible")

    @functools.cached_property
    def problems(self) -> tuple[Problem, ...]:
        """All problems. Raises UserError, with file and line, for a row without a question or a number."""
        return read_items(self.path, self._read)

    @staticmethod
    def _read(where: Where, row: Json) -> Problem:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.problems)

    def example(self, i: int) -> Conversation:
        problem = self.problems[i]
        return Message("user", problem.question + ASKED), Message("assistant", problem.solution)

    def score(self, i: int, reply: Reply) -> Score:
        right = self.problems[i].answer
        found = {"strict": extract.strict_number(reply.text), "flexible": extract.last_number(reply.text)}
        parts = {name: float(value == right) for name, value in found.items()}
        chosen = found[self.extraction]
        if chosen is None:
            return unanswered(reply, parts)
        return Score(parts[self.extraction], parts=parts, extracted=str(chosen))

    def cluster(self, i: int) -> str:
        return extract.fold(self.problems[i].question)

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=512)


@dataclasses.dataclass(frozen=True)
class Gsm8k(WordProblems):
    """Grade-school maths (Cobbe et al. 2021, arXiv:2110.14168): lines with "question" and "answer", whose last line is
    "#### " and a number. Annotations of the calculator, <<48/2=24>>, are left out."""

    @staticmethod
    def _read(where: Where, row: Json) -> Problem:
        solution, mark, last = field(row, "answer").rpartition("####")
        if not mark or (answer := extract.number(last)) is None:
            raise UserError(f'answer: got {field(row, "answer")[-40:]!r}, must end with "#### " and a number')
        steps = re.sub(r"<<[^>]*>>", "", solution).strip()
        return Problem(field(row, "question").strip(), f"{steps}\n#### {last.strip()}".strip(), answer)


@dataclasses.dataclass(frozen=True)
class MultiArith(WordProblems):
    """Short problems in the form of LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): "instruction" and a number in
    "answer". "output" is a model's solution, of which not all are right; a wrong one is left out."""

    @staticmethod
    def _read(where: Where, row: Json) -> Problem:
        said = str(field(row, "answer", kind=(str, int, float)))
        if (answer := extract.number(said)) is None:
            raise UserError(f"answer: got {said!r}, must be a number")
        steps = str(row.get("output", "")).strip().removeprefix("A:").strip()
        steps = f"{steps}\n" if extract.strict_number(steps) == answer else ""
        plain = f"{answer.normalize():f}"
        return Problem(field(row, "instruction", "question").strip(), f"{steps}#### {plain}", answer)
