"""The rules of MassiveText (Gopher, arXiv:2112.11446, tables A1 and section A.1): quality and repetition.

Names of reasons, order of the rules and thresholds are those of datatrove 0.10.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import ClassVar

from gptjax.data.prepare.steps import Drop, Step
from gptjax.data.prepare.words import words

Limits = tuple[tuple[int, float], ...]
"""(n, largest fraction of the characters) for n-grams."""


@dataclasses.dataclass(frozen=True)
class GopherQuality(Step):
    """Gopher's quality rules: number and length of words, symbols, bullets, ellipses, letters, stop words."""

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    """Smallest mean length of words."""
    max_word_length: float = 10.0
    """Largest mean length of words."""
    max_symbols: float = 0.1
    """Largest number of hashes, and of ellipses, per word."""
    max_bullet_lines: float = 0.9
    """Largest fraction of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Largest fraction of lines that end with an ellipsis."""
    min_alphabetic: float = 0.8
    """Smallest fraction of words with a letter."""
    min_stop_words: int = 2
    """Smallest number of different stop words."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def __call__(self, text: str) -> str | Drop:
        found = words(text)
        lengths = [len(word) for word in found if any(map(str.isalnum, word))]
        if len(lengths) < max(1, self.min_words):
            return Drop("gopher_short_doc")
        if len(lengths) > self.max_words:
            return Drop("gopher_long_doc")
        mean = sum(lengths) / len(lengths)
        if mean < self.min_word_length:
            return Drop("gopher_below_avg_threshold")
        if mean > self.max_word_length:
            return Drop("gopher_above_avg_threshold")
        if text.count("#") / len(found) > self.max_symbols:
            return Drop("gopher_too_many_hashes")
        if (text.count("...") + text.count("…")) / len(found) > self.max_symbols:
            return Drop("gopher_too_many_ellipsis")
        lines = text.splitlines()
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > self.max_bullet_lines:
            return Drop("gopher_too_many_bullets")
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > self.max_ellipsis_lines:
            return Drop("gopher_too_many_end_ellipsis")
        if sum(any(map(str.isalpha, word)) for word in found) / len(found) < self.min_alphabetic:
            return Drop("gopher_below_alpha_threshold")
        if len(set(self.stop_words).intersection(found)) < self.min_stop_words:
            return Drop("gopher_enough_stop_words")
        return text


@dataclasses.dataclass(frozen=True)
class GopherRepetition(Step):
    """Gopher's rules of repetition: paragraphs, lines and n-grams of words that occur again."""

    _joint: ClassVar[str] = " "
    _least: ClassVar[int] = 1

    dup_para_frac: float = 0.3
    """Largest fraction of paragraphs that occurred before."""
    dup_para_char_frac: float = 0.2
    """Largest fraction of characters in them."""
    dup_line_frac: float = 0.3
    """Largest fraction of lines that occurred before."""
    dup_line_char_frac: float = 0.2
    """Largest fraction of characters in them."""
    top_n_grams: Limits = ((2, 0.2), (3, 0.18), (4, 0.16))
    """Largest fraction of characters in the most frequent n-gram, for each n."""
    dup_n_grams: Limits = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    """Largest fraction of characters in n-grams that occurred before, for each n."""

    def __call__(self, text: str) -> str | Drop:
        if not text.strip():
            return Drop("empty")
        parts = (("para", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text)))
        for name, items in parts:
            count, characters = duplicates(items)
            if count / len(items) > getattr(self, f"dup_{name}_frac"):
                return Drop(f"dup_{name}_frac")
            if characters / len(text) > getattr(self, f"dup_{name}_char_frac"):
                return Drop(f"dup_{name}_char_frac")
        found = words(text)
        for n, limit in self.top_n_grams:
            if self._top(found, n) / len(text) > limit:
                return Drop(f"top_{n}_gram")
        for n, limit in self.dup_n_grams:
            if _repeated(found, n) / len(text) > limit:
                return Drop(f"duplicated_{n}_n_grams")
        return text

    def _top(self, found: list[str], n: int) -> int:
        """Characters of all occurrences of the most frequent n-gram."""
        counts = collections.Counter(self._joint.join(found[i : i + n]) for i in range(len(found) - n + 1))
        gram, count = max(counts.items(), default=("", 0), key=lambda item: item[1])
        return len(gram) * count if count >= self._least else 0


def duplicates(items: list[str]) -> tuple[int, int]:
    """Number of items that occurred before, and of their characters."""
    seen: set[str] = set()
    count = characters = 0
    for item in items:
        if item in seen:
            count, characters = count + 1, characters + len(item)
        seen.add(item)
    return count, characters


def _repeated(found: list[str], n: int) -> int:
    """Characters in n-grams that occurred before, none counted twice."""
    seen: set[str] = set()
    characters = at = 0
    while at < len(found) - n + 1:
        gram = "".join(found[at : at + n])
        if gram in seen:
            characters, at = characters + len(gram), at + n
        else:
            seen.add(gram)
            at += 1
    return characters
