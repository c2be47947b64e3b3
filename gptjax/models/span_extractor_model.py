"""API of a model that finds answers in passages:

reader = gptjax.load("runs/questions", kind=gptjax.SpanExtractorModel)
reader.answer("Where did Ada live?", "Ada lived in London.")  # Answer(text="London", start=13, end=19, score=0.98)
reader.answers([(question, passage), ...], unanswerable=True)
reader.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.questions import Window, Windows
from gptjax.models.model import TextEncoder
from gptjax.nn import BackboneConfig, SpanExtractorConfig
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer found in a passage."""

    text: str
    """passage[start:end]. Empty: the passage has no answer."""
    start: int
    """First character."""
    end: int
    """Character after the last."""
    score: float
    """Probability of its first token times that of its last, each over the tokens of a window."""


@dataclasses.dataclass(frozen=True, eq=False)
class SpanExtractorModel(TextEncoder):
    """A model for extractive question answering. Raises UserError if configuration, parameters and tokenizer do not
    match."""

    config: SpanExtractorConfig
    length: int = 384
    """Maximum tokens of a window, its question included."""
    stride: int = 128
    """Tokens of the passage from the beginning of one window to that of the next."""
    question_length: int = 64
    """Maximum tokens of a question. Longer ones are truncated."""

    def __post_init__(self):
        super().__post_init__()
        assert self._windows

    def answer(self, question: str, context: str, unanswerable: bool = False, max_tokens: int = 30) -> Answer:
        """The likeliest answer in a passage; see `answers`."""
        return self.answers([(question, context)], unanswerable, max_tokens)[0]

    def answers(
        self, questions: Sequence[tuple[str, str]], unanswerable: bool = False, max_tokens: int = 30, batch: int = 32
    ) -> list[Answer]:
        """The likeliest answer to each question about a passage: the span of the passage whose first and last token
        have the largest product of probabilities, of all windows.

        questions     (question, passage) of each
        unanswerable  True: an empty answer, if the first token of every window is likelier than any span
        max_tokens    maximum tokens of an answer
        batch         windows per forward pass: changes speed and memory only

        Raises UserError, with its number, for a passage without text."""
        if max_tokens < 1:
            raise UserError(f"max_tokens: got {max_tokens}, must be at least 1")
        encoded, windows = [], []
        for number, (question, context) in enumerate(questions):
            passage, spans = self.tokenizer.encode_spans(context)
            of_passage = self._windows(self.tokenizer.encode(question), passage, self.tokenizer)
            if not of_passage:
                raise UserError(f"questions: {number}: got an empty passage, must have text to find an answer in")
            encoded.append((context, spans, slice(len(windows), len(windows) + len(of_passage))))
            windows += of_passage
        types = [window.types for window in windows]
        logits = self._outputs(self._module, [window.ids for window in windows], batch, types)
        found = []
        for context, spans, mine in encoded:
            spots = [_best(w, x, max_tokens) for w, x in zip(windows[mine], logits[mine], strict=True)]
            score, first, last, _ = max(spots)
            missing = min(none for *_, none in spots)
            start, end = _stripped(context, spans[first][0], spans[last][1])
            none = unanswerable and missing > score
            found.append(Answer("", 0, 0, missing) if none else Answer(context[start:end], start, end, score))
        return found

    @property
    def _windows(self) -> Windows:
        limit = self.config.max_positions
        length = self.length if limit is None else min(self.length, limit)
        return Windows(length, self.stride, self.question_length)

    @property
    def _backbone(self) -> BackboneConfig:
        return self.config.backbone

    @property
    def _settings(self) -> dict[str, Any]:
        return {"length": self.length, "stride": self.stride, "question_length": self.question_length}

    @property
    def _hf_settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def settings_of_run(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {name: data[name] for name in ("length", "stride", "question_length") if name in data}


def _best(window: Window, logits: np.ndarray, max_tokens: int) -> tuple[float, int, int, float]:
    """Probability of a window's best span, its first and last token in the passage, and the probability that there is
    none. logits [T, 2] of start and end."""
    logits = logits[: len(window.ids)].astype(np.float64)
    likely = np.exp(logits - logits.max(0))
    likely /= likely.sum(0)
    starts, ends = likely[window.passage].T
    size = len(starts)
    spans = np.triu(np.outer(starts, ends)) * np.tri(size, size, max_tokens - 1)
    first, last = divmod(int(spans.argmax()), size)
    return float(spans[first, last]), window.first + first, window.first + last, float(likely[0].prod())


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The part of text[start:end] without spaces around it; all of it if it has nothing else."""
    part = text[start:end]
    if not part.strip():
        return start, end
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
