"""Texts whose words, or whose steps, have labels: token classification and process rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from gptjax.data.classify import check_classes
from gptjax.data.dataset import Dataset
from gptjax.data.encoding import DROPPED, TRUNCATED, Encode, Encoded
from gptjax.data.files import Where
from gptjax.data.packing import NoPacking, PackedSequences, Packing
from gptjax.data.sources import JsonRows
from gptjax.data.store import Store, combine, spread_ranges
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import ModelConfig, Tokenizer
from gptjax.types import Batch, Json, TokenLabelled, UserError

Side = Literal["tokens", "labels"]
"""Stored part of a document: its tokens, or the class of each."""


@dataclasses.dataclass(frozen=True)
class Tagged:
    """The words of a text, each with its class, counted from 0."""

    words: tuple[str, ...]
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Steps:
    """A problem and the steps of a solution, each with its class: 1 if it is right."""

    prompt: str
    steps: tuple[str, ...]
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TaggedJsonl(JsonRows):
    """Words with labels, one text per line: `{"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]}`."""

    classes: tuple[str, ...]
    """Labels of the classes, in order from class 0."""
    words: str = "tokens"
    """Field with the words."""
    tags: str = "tags"
    """Field with their labels, of `classes`, or the numbers of classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise UserError(f"classes: got {self.classes}, must be at least two labels, no two alike")

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, Tagged]]:
        words, tags = _lists(where, row, self.words, self.tags)
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise UserError(f"path: {where}: {self.words}: got {str(words)[:80]}, must be words")
        numbers = [self._class(where, tag) for tag in tags]
        return [(" ".join(words), Tagged(tuple(words), tuple(numbers)))]

    def _class(self, where: Where, tag: Json) -> int:
        if isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag < len(self.classes):
            return tag
        if tag not in self.classes:
            raise UserError(f"path: {where}: {self.tags}: got {tag!r}, must be one of {', '.join(self.classes)}")
        return self.classes.index(tag)


@dataclasses.dataclass(frozen=True)
class StepsJsonl(JsonRows):
    """Solutions with a label per step, one per line, as in TRL: `{"prompt": "2 + 3 * 4?", "completions": ["3 * 4 = 12",
    "2 + 12 = 15"], "labels": [true, false]}`."""

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, Steps]]:
        steps, labels = _lists(where, row, "completions", "labels")
        if not isinstance(row.get("prompt"), str):
            raise UserError(f'path: {where}: got no text in "prompt", must have one')
        if not all(isinstance(step, str) and step.strip() for step in steps):
            raise UserError(f"path: {where}: completions: got {str(steps)[:80]}, must be texts")
        if wrong := [label for label in labels if label not in (0, 1)]:
            raise UserError(f"path: {where}: labels: got {wrong[0]!r}, must be true or false")
        return [(row["prompt"], Steps(row["prompt"], tuple(steps), tuple(map(int, labels))))]


def _lists(where: Where, row: Json, *names: str) -> list[list[Any]]:
    """Two lists of a row, equally long and not empty."""
    found: list[Any] = [row.get(name) if isinstance(row, Mapping) else None for name in names]
    if not all(isinstance(each, list) and each for each in found) or len(found[0]) != len(found[1]):
        sizes = " and ".join(str(len(each)) if isinstance(each, list) else type(each).__name__ for each in found)
        raise UserError(f"path: {where}: got {sizes} in {' and '.join(names)}, must be two lists of one length")
    return found


def word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each word, as they are in a text of the words with spaces between."""
    a, both = tokenizer.encode("a"), tokenizer.encode("a a")
    space = "" if both == a + a else " "  # SentencePiece and WordPiece add their own
    return tokenizer.encode_batch([word if i == 0 else space + word for i, word in enumerate(words)])


def tagged_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a text, and the index of each word's first token, which has the word's label; -1 for a word of which
    the tokenizer makes none."""
    ids, firsts = [], []
    start = len(add_bos_eos([], tokenizer, False))
    for word in word_ids(words, tokenizer):
        firsts.append(start + len(ids) if word else -1)
        ids += word
    return add_bos_eos(ids, tokenizer), firsts


def step_ids(prompt: str, steps: Sequence[str], tokenizer: Tokenizer, separator: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and the steps of a solution, and the index of the last token of the separator after each
    step, which has the step's label."""
    ids, lasts = add_bos_eos(tokenizer.encode(prompt), tokenizer, False), []
    for step in steps:
        ids += [*tokenizer.encode(step), *tokenizer.encode(separator)]
        lasts.append(len(ids) - 1)
    return ids, lasts


@dataclasses.dataclass(frozen=True)
class ClassifyTokens(Dataset):
    """Texts whose words have labels, one per sequence. The first token of each word has its label, as usual for
    `transformers`. A source is `TaggedJsonl`."""

    batch_type: ClassVar[type[Batch]] = TokenLabelled
    document_type: ClassVar[type | tuple[type, ...]] = Tagged

    packing: Packing = NoPacking()
    """Packing of texts into sequences: one per sequence, truncated to its length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing != NoPacking():
            raise UserError(f"packing: got {self.packing}, must be NoPacking(), one text per sequence")

    def encodings(self) -> tuple[Encode, ...]:
        return TagEncoder("tokens", self.length), TagEncoder("labels", self.length)

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> TokenLabelledSequences:
        tokens, labels = stores
        return TokenLabelledSequences(tokens, self.packing.plan(tokens.offsets, self.length), labels)

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Raises UserError: a classifier does not generate text."""
        raise UserError(f"prompts: got {text!r}, must be none: a classifier does not generate text")

    def texts_of(self, document: Any) -> Iterable[str]:
        return (" ".join(document.words),)

    def empty(self, size: int) -> TokenLabelled:
        return TokenLabelled(**vars(super().empty(size)))

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        check_classes(self, model)


@dataclasses.dataclass(frozen=True)
class ClassifySteps(ClassifyTokens):
    """Solutions whose steps are right or wrong, one per sequence: process rewards. The last token of the separator
    after each step has its label. A source is `StepsJsonl`. Steps beyond the length are left out."""

    document_type: ClassVar[type | tuple[type, ...]] = Steps

    step_separator: str = "\n"
    """Text after each step. The prompt is as the source has it, as in TRL."""

    def encodings(self) -> tuple[Encode, ...]:
        return StepEncoder("tokens", self.length, self.step_separator), StepEncoder(
            "labels", self.length, self.step_separator
        )

    def texts_of(self, document: Any) -> Iterable[str]:
        return (document.prompt + "".join(step + self.step_separator for step in document.steps),)

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        if (classes := getattr(model, "classes", None)) != 2:
            raise UserError(f"model.classes: got {classes}, must be 2 for steps, wrong or right")


def _encoded(side: Side, length: int, ids: Sequence[int], at: Sequence[int], labels: Sequence[int]) -> Encoded:
    """One side of a document: its first `length` tokens, or their labels with their weights."""
    size = min(len(ids), length)
    kept = {place: label for place, label in zip(at, labels, strict=True) if 0 <= place < size}
    if not kept:
        return Encoded([], note=DROPPED if side == "tokens" else None)
    if side == "tokens":
        return Encoded(ids[:size], note=TRUNCATED if size < len(ids) else None)
    return Encoded([kept.get(t, 0) for t in range(size)], [float(t in kept) for t in range(size)])


@dataclasses.dataclass(frozen=True)
class TagEncoder:
    """Encoding of words with labels: the tokens of the text, or their labels."""

    side: Side
    length: int
    """Maximum tokens of a text."""

    def __call__(self, documents: Iterator[Tagged], tokenizer: Tokenizer) -> Iterator[Encoded]:
        for text in documents:
            yield _encoded(self.side, self.length, *tagged_ids(text.words, tokenizer), text.labels)


@dataclasses.dataclass(frozen=True)
class StepEncoder(TagEncoder):
    """Encoding of solutions with labels of steps: their tokens, or the labels."""

    separator: str

    def __call__(self, documents: Iterator[Steps], tokenizer: Tokenizer) -> Iterator[Encoded]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for one in documents:
            ids, at = step_ids(one.prompt, one.steps, tokenizer, self.separator)
            yield _encoded(self.side, self.length, ids, at, one.labels)


@dataclasses.dataclass(frozen=True)
class TokenLabelledSequences(PackedSequences):
    """Sequences of one document each, with the labels of its tokens: sequence d is document d."""

    labels: Store

    @property
    def fingerprint(self) -> str:
        return combine(super().fingerprint, self.labels.fingerprint)

    def fill(self, batch: TokenLabelled, at: np.ndarray, index: np.ndarray) -> None:
        super().fill(batch, at, index)
        pieces = self.plan.pieces(index)
        labels, weights = self.labels.read(pieces.start, pieces.size)
        where = spread_ranges(at[pieces.row] * batch.tokens.shape[1], pieces.size)
        assert weights is not None
        np.asarray(batch.targets).reshape(-1)[where] = labels
        np.asarray(batch.weights).reshape(-1)[where] = weights
