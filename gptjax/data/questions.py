"""Questions whose answers are parts of a passage: extractive question answering."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from gptjax import protocols
from gptjax.data.classify import Classify
from gptjax.data.encoding import DROPPED, TRUNCATED, Encode, Encoded
from gptjax.data.files import Where, field
from gptjax.data.sources import JsonRows
from gptjax.data.tokenizers import Tokenizer
from gptjax.types import AnswerSpans, Batch, Json, UserError

WIDENED = "with an answer that begins or ends inside a token"
SPECIALS = 4
"""Maximum number of special tokens around a question and its passage: RoBERTa's."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a passage. The first answer is learnt, all are right."""

    context: str
    question: str
    answers: tuple[str, ...]
    """Parts of the context. Empty: it has no answer."""
    starts: tuple[int, ...] = ()
    """First character of each answer."""


@dataclasses.dataclass(frozen=True)
class QuestionsJsonl(JsonRows):
    """SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, arXiv:1606.05250): its JSON file, or one question per line,
    `{"context": "Ada lived in London.", "question": "Where?", "answers": {"text": ["London"], "answer_start": [13]}}`.
    Without answers a question is unanswerable. All questions about one passage are in one split."""

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, Question]]:
        try:
            return [(question.context, question) for question in questions_of(row)]
        except UserError as error:
            raise UserError(f"path: {where}: {error}") from None


def questions_of(row: Json, located: bool = True) -> Iterator[Question]:
    """Questions of a row: of SQuAD's JSON file, or one. Raises UserError for another row, and for an answer that does
    not stand at its offset. located=False: without offsets."""
    if not isinstance(row, Mapping) or "data" not in row:
        yield _question(field(row, "context"), row, located)
        return
    for article in field(row, "data", kind=list):
        for paragraph in field(article, "paragraphs", kind=list):
            for asked in field(paragraph, "qas", kind=list):
                yield _question(field(paragraph, "context"), asked, located)


def _question(context: str, row: Json, located: bool) -> Question:
    question, found = field(row, "question"), field(row, "answers", kind=(list, Mapping))
    try:
        if isinstance(found, Mapping):
            texts = field(found, "text", kind=list)
            starts = field(found, "answer_start", kind=list) if located else ()
        else:
            texts = [field(answer, "text") for answer in found]
            starts = [field(answer, "answer_start", kind=int) for answer in found] if located else ()
        if located and len(starts) != len(texts):
            raise UserError(f"answers: got {len(texts)} texts and {len(starts)} offsets, must be as many")
        for text, start in zip(texts, starts, strict=False):
            if not isinstance(text, str) or not text or type(start) is not int or start < 0:
                raise UserError(f"answers: got {text!r} at {start!r}, must be a text at a character of the context")
            if (there := context[start : start + len(text)]) != text:
                raise UserError(f"answer_start: got {start}, where the context has {there!r}, must be at {text!r}")
    except UserError as error:
        raise UserError(f"question {str(row.get('id', question))[:60]!r}: {error}") from None
    return Question(context, question, tuple(texts), tuple(starts))


class Window(NamedTuple):
    """A question with some tokens of its passage, as the model reads them."""

    ids: list[int]
    passage: range
    """Places of the passage's tokens in `ids`."""
    first: int
    """Number of the first of them in the passage."""

    @property
    def types(self) -> list[int]:
        """0 for tokens of the question, 1 from the passage on."""
        return [int(place >= self.passage.start) for place in range(len(self.ids))]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a passage, each behind its question: `[CLS] question [SEP] passage [SEP]` in BERT."""

    length: int
    """Maximum tokens of a window, its question included."""
    stride: int
    """Tokens of the passage from the beginning of one window to that of the next, at most as many as fit."""
    question_length: int
    """Maximum tokens of a question. Longer ones are truncated."""

    def __post_init__(self) -> None:
        for name in ("stride", "question_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, must be at least 1")
        if self.length <= self.question_length + SPECIALS:
            raise UserError(
                f"length: got {self.length}, must be more than {self.question_length + SPECIALS}, question_length and "
                "the special tokens"
            )

    def __call__(self, asked: Sequence[int], passage: Sequence[int], tokenizer: Tokenizer) -> list[Window]:
        """Windows of a question and a passage, as ids. None if the passage has no token."""
        before, between, after = tokenizer.pair_ids
        head = [*before, *asked[: self.question_length], *between]
        size = self.length - len(head) - len(after)
        step = min(self.stride, size)
        found = []
        for first in range(0, max(len(passage) - size + step, 1) if passage else 0, step):
            part = passage[first : first + size]
            found.append(Window([*head, *part, *after], range(len(head), len(head) + len(part)), first))
        return found


def answer_tokens(context: str, spans: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    """First and last of the tokens with these spans that have a character of context[start:stop], spaces apart. None:
    no token has one."""
    inside = [
        i
        for i, (a, b) in enumerate(spans)
        if a < stop and b > start and not context[max(a, start) : min(b, stop)].isspace()
    ]
    return (inside[0], inside[-1]) if inside else None


@dataclasses.dataclass(frozen=True)
class QuestionEncoder(Windows):
    """Encoding of questions with their passages, a document for each window. Its label is the place at which the
    passage begins, and those of the answer's first and last token, or 0 for an answer that is not in the window."""

    def __call__(self, documents: Iterator[Question], tokenizer: protocols.Tokenizer) -> Iterator[Encoded]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(tokenizer, Tokenizer):
            raise UserError(f"tokenizer: got a {type(tokenizer).__name__}, must be a gptjax.data.Tokenizer, with spans")
        for document in documents:
            asked = tokenizer.encode(document.question)
            passage, spans = tokenizer.encode_spans(document.context)
            answer, note = None, TRUNCATED if len(asked) > self.question_length else None
            if document.answers:
                start, stop = document.starts[0], document.starts[0] + len(document.answers[0])
                answer = answer_tokens(document.context, spans, start, stop)
                if answer is None:
                    yield Encoded([], note="without a token of the answer")
                    continue
                if document.context[spans[answer[0]][0] : spans[answer[1]][1]].strip() != document.answers[0].strip():
                    note = WIDENED
            windows = super().__call__(asked, passage, tokenizer)
            if not windows:
                yield Encoded([], note=DROPPED)
            for number, window in enumerate(windows):
                begin, places = window.passage.start, (0, 0)
                if answer is not None and window.first <= answer[0] and answer[1] - window.first < len(window.passage):
                    places = tuple(begin + token - window.first for token in answer)
                yield Encoded(window.ids, label=(begin, *places), note=None if number else note)


@dataclasses.dataclass(frozen=True)
class ExtractAnswers(Classify):
    """Questions about passages, one per sequence, for models that find the answer in the passage. A source is
    `QuestionsJsonl`. A passage that is longer than a sequence is read in overlapping windows, each behind the question;
    one that does not have the whole answer has none, as in BERT (Devlin et al. 2018, arXiv:1810.04805)."""

    batch_type: ClassVar[type[Batch]] = AnswerSpans
    document_type: ClassVar[type | tuple[type, ...]] = Question

    stride: int = 128
    """Tokens of the passage from the beginning of one window to that of the next, at most as many as fit."""
    question_length: int = 64
    """Maximum tokens of a question. Longer ones are truncated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encodings()

    def encodings(self) -> tuple[Encode, ...]:
        return (QuestionEncoder(self.length, self.stride, self.question_length),)

    def texts_of(self, document: Question) -> Iterable[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (document.question, document.context)

    def empty(self, size: int) -> AnswerSpans:
        return AnswerSpans(**{**vars(super().empty(size)), "labels": np.full((size, 3), -1, np.int32)})
