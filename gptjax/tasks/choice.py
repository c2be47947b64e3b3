"""Multiple choice: ARC, PIQA and MMLU, in their own files and in those of LLM-Adapters.

In a conversation the options have the letters A, B, ..., and the reply is a letter. For a model that continues texts
the options are compared by their likelihoods (`choices`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gptjax.data.chat import Conversation, Message
from gptjax.data.files import Where, field
from gptjax.tasks import extract
from gptjax.tasks.rows import read_items
from gptjax.tasks.task import Choices, ChoiceTask, Generation, Normalisation, Reply, Score, unanswered
from gptjax.types import Json, UserError

ASKED = "\n\nAnswer with the letter of the right option."
"""Form of the answer that the prompts ask for."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with options. Raises UserError for fewer than two options, or an answer that is none of them."""

    question: str
    options: tuple[str, ...]
    answer: int
    """Index of the right option."""
    subject: str = ""
    """Subject, or "". """

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= len(string.ascii_uppercase):
            raise UserError(f"options: got {len(self.options)}, must be 2 to {len(string.ascii_uppercase)}")
        if not 0 <= self.answer < len(self.options):
            raise UserError(f"answer: got option {self.answer + 1}, must be 1 to {len(self.options)}")


@dataclasses.dataclass(frozen=True)
class MultipleChoice(ChoiceTask):
    """Questions of a file. Base class. The outcome is the equality of letters, by the extraction named in `extraction`;
    `parts` has both."""

    path: str
    """File of the questions, a glob or a URL."""
    extraction: Literal["strict", "flexible"] = "strict"
    """Answer that counts: "strict", the one letter that is the reply or follows "answer is"; "flexible", also the only
    letter that stands alone, or the only option whose text the reply has."""

    def __post_init__(self) -> None:
        if self.extraction not in ("strict", "flexible"):
            raise UserError(f"extraction: got {self.extraction!r}, must be strict or flexible")

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """All questions. Raises UserError, with file and line, for a row that is none."""
        return read_items(self.path, self._read)

    @staticmethod
    def _read(where: Where, row: Json) -> Question:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.questions)

    def example(self, i: int) -> Conversation:
        item = self.questions[i]
        answer = string.ascii_uppercase[item.answer]
        return Message("user", lettered(item) + ASKED), Message("assistant", answer)

    def text(self, i: int) -> str:
        return f"Question: {lettered(self.questions[i])}\nAnswer:"

    def score(self, i: int, reply: Reply) -> Score:
        item = self.questions[i]
        labels = string.ascii_uppercase[: len(item.options)]
        options = list(zip(labels, item.options, strict=True))
        found = {"strict": extract.strict_label(reply.text, labels), "flexible": None}
        found["flexible"] = extract.flexible_label(reply.text, options)
        parts = {name: float(label == labels[item.answer]) for name, label in found.items()}
        if (chosen := found[self.extraction]) is None:
            return unanswered(reply, parts)
        return Score(parts[self.extraction], parts=parts, extracted=chosen)

    def choices(self, i: int) -> Choices:
        item = self.questions[i]
        context = f"Question: {item.question}\nAnswer:"
        return Choices(tuple((context, f" {option}") for option in item.options), item.answer, "Answer:")

    @property
    def normalisation(self) -> Normalisation:
        """By characters: lm-eval's acc_norm, by which ARC, PIQA and HellaSwag are compared."""
        return "character"

    def cluster(self, i: int) -> str:
        return extract.fold(self.questions[i].question)

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=32, text_stop=("\n",))


def lettered(item: Question) -> str:
    """The question, and a line of each option with its letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, item.options, strict=False)]
    return "\n".join([item.question, *lines])


@dataclasses.dataclass(frozen=True)
class Arc(MultipleChoice):
    """AI2 Reasoning Challenge, easy and challenge (Clark et al. 2018, arXiv:1803.05457): {"question": ..., "choices":
    {"text": [...], "label": [...]}, "answerKey": ...}, {"question": {"stem": ..., "choices": [{"text": ..., "label":
    ...}]}, "answerKey": ...}, or the form of LLM-Adapters."""

    @staticmethod
    def _read(where: Where, row: Json) -> Question:
        if "instruction" in row:
            return adapters(row)
        asked = field(row, "question", "question_stem", kind=(str, Mapping))
        inside = row if isinstance(asked, str) else asked
        choices = field(inside, "choices", kind=(list, Mapping))
        if isinstance(choices, Mapping):
            texts, labels = field(choices, "text", kind=list), field(choices, "label", kind=list)
        else:
            texts, labels = [field(c, "text") for c in choices], [field(c, "label") for c in choices]
        key = field(row, "answerKey")
        if key not in labels:
            raise UserError(f"answerKey: got {key!r}, must be one of {', '.join(map(str, labels))}")
        return Question(field(inside, "question", "question_stem", "stem"), tuple(texts), labels.index(key))


@dataclasses.dataclass(frozen=True)
class ArcEasy(Arc):
    """ARC's easy part."""


@dataclasses.dataclass(frozen=True)
class ArcChallenge(Arc):
    """ARC's challenge."""


@dataclasses.dataclass(frozen=True)
class Piqa(MultipleChoice):
    """Physical interaction (Bisk et al. 2020, arXiv:1911.11641): {"goal": ..., "sol1": ..., "sol2": ..., "label": 0 or
    1}, or the form of LLM-Adapters, in which BoolQ, HellaSwag, SIQA and WinoGrande come too."""

    @staticmethod
    def _read(where: Where, row: Json) -> Question:
        if "instruction" in row:
            return adapters(row)
        options = field(row, "sol1"), field(row, "sol2")
        return Question(field(row, "goal"), options, field(row, "label", kind=int))


@dataclasses.dataclass(frozen=True)
class Mmlu(MultipleChoice):
    """Massive multitask language understanding (Hendrycks et al. 2021, arXiv:2009.03300): {"question": ..., "choices":
    [...], "answer": 0 to 3 or a letter, "subject": ...}, or CSV without a header: question, options, letter. The
    likelihoods are those of the letters."""

    @staticmethod
    def _read(where: Where, row: Json) -> Question:
        if isinstance(row, list):
            if len(row) < 4:
                raise UserError(f"got {len(row)} columns, must be the question, the options and the letter")
            subject = re.sub(r"_(test|val|dev)$", "", where.file.rpartition("/")[2].partition(".")[0])
            return Question(row[0], tuple(row[1:-1]), index(row[-1], row[1:-1]), subject.replace("_", " "))
        options = field(row, "choices", kind=list)
        answer = field(row, "answer", kind=(int, str))
        number = index(answer, options) if isinstance(answer, str) else answer
        return Question(field(row, "question"), tuple(options), number, row.get("subject", "").replace("_", " "))

    @property
    def normalisation(self) -> Normalisation:
        """None: the options are letters."""
        return "none"

    def choices(self, i: int) -> Choices:
        item = self.questions[i]
        letters = string.ascii_uppercase[: len(item.options)]
        return Choices(tuple((self.text(i), f" {letter}") for letter in letters), item.answer, "Answer:")

    def text(self, i: int) -> str:
        item = self.questions[i]
        about = f" about {item.subject}" if item.subject else ""
        return f"The following are multiple choice questions (with answers){about}.\n\n{lettered(item)}\nAnswer:"


def index(letter: str, options: Sequence[str]) -> int:
    """Index of the option of a letter. Raises UserError for another one."""
    if (found := string.ascii_uppercase[: len(options)].find(letter.strip().upper())) < 0 or not letter.strip():
        raise UserError(
            f"answer: got {letter!r}, must be a letter from A to {string.ascii_uppercase[len(options) - 1]}"
        )
    return found


def adapters(row: Mapping[str, Any]) -> Question:
    """A question in the form of LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): the instruction ends with "Answer
    format: answer1/answer2", and has "Answer1: ... Answer2: ..." unless the options are true and false."""
    asked, mark, names = field(row, "instruction").rpartition("Answer format:")
    labels = [name.strip() for name in names.split("/")]
    answer = field(row, "answer")
    if not mark or answer not in labels:
        raise UserError(f'answer: got {answer!r}, must be one of "Answer format: ..." at the end of the instruction')
    asked = re.sub(r"\A\s*Please (?:choose|answer)[^:?]*:\s*", "", asked)
    places, start = [], 0
    for label in labels:  # in order, so that an option that names another label is not split
        if (match := re.compile(rf"(?<!\w){re.escape(label)}\s*:", re.IGNORECASE).search(asked, start)) is None:
            break
        places, start = [*places, match], match.end()
    if places and len(places) != len(labels):
        raise UserError(f"instruction: got {len(places)} options, must be {len(labels)}: {', '.join(labels)}")
    if not places:
        return Question(asked.strip(), tuple(labels), labels.index(answer))
    ends = [*[match.start() for match in places[1:]], len(asked)]
    options = [asked[match.end() : end].strip() for match, end in zip(places, ends, strict=True)]
    return Question(asked[: places[0].start()].strip(), tuple(options), labels.index(answer))
