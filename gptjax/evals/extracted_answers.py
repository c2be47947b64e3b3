"""Exact match and F1 of answers that are found in passages, as SQuAD counts them."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar

from gptjax.data.encoding import held_out
from gptjax.data.questions import Question
from gptjax.evals.intervals import mean
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.tasks.squad import match
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class ExtractedAnswers(Evaluation):
    """Exact match and F1 of held-out questions, each the best over its right answers, without case, punctuation and
    articles (Rajpurkar et al. 2016, arXiv:1606.05250): `ExtractedAnswers(source)(span_extractor_model) -> Result`.
    Questions about one passage form a cluster. If some have no answer, none is a possible answer to all."""

    architectures: ClassVar[tuple[str, ...]] = ("span-extractor",)

    source: Source[Question]
    """Source of questions: `data.QuestionsJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of questions, the first of the split. None: all."""
    max_tokens: int = 30
    """Maximum tokens of an answer."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, Question)

    def __call__(self, model: Any) -> Result:
        questions = held_out(self.source, self.split, self.documents, Question)
        unanswerable = not all(question.answers for question in questions)
        asked = [(question.question, question.context) for question in questions]
        found = model.answers(asked, unanswerable, self.max_tokens)
        exact, f1 = zip(*(match(a.text, q.answers) for a, q in zip(found, questions, strict=True)), strict=True)
        clusters = [hashlib.sha256(question.context.encode()).hexdigest()[:16] for question in questions]
        right, overlap = mean(exact, clusters), mean(f1, clusters)
        values = {
            "exact_match": right.mean,
            "low": right.low,
            "high": right.high,
            "f1": overlap.mean,
            "f1_low": overlap.low,
            "f1_high": overlap.high,
            "questions": len(questions),
        }
        items = tuple(
            {"item": i, "cluster": clusters[i], "outcome": exact[i], "f1": f1[i], "answer": answer.text}
            for i, answer in enumerate(found)
        )
        return Result("Extracted answers", values, f"Exact match **{right:.1%}**; F1 {overlap:.1%}.", items)
