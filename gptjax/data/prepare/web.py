"""Rules for pages of the web: C4 (arXiv:1910.10683) and FineWeb (arXiv:2406.17557), as in datatrove 0.10."""

from __future__ import annotations

import collections
import dataclasses
import re

from gptjax.data.prepare.gopher import duplicates
from gptjax.data.prepare.steps import Drop, Edit, Step
from gptjax.data.prepare.words import STOPS, count_sentences, words

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclasses.dataclass(frozen=True)
class C4Quality(Step):
    """C4's rules: removes lines without terminal punctuation, of few words, and about JavaScript, cookies and policies;
    drops pages with "lorem ipsum", a curly bracket, or few sentences."""

    terminal_punctuation: bool = True
    """Remove lines that do not end in a mark. FineWeb leaves them."""
    min_sentences: int = 5
    """Smallest number of sentences in the lines that are kept."""
    min_words_per_line: int = 3
    """Lines of fewer words are removed."""
    max_word_length: int = 1000
    """Lines with a longer word are removed."""
    curly_brackets: bool = False
    """Keep pages with a curly bracket."""

    def __call__(self, text: str) -> str | Edit | Drop:
        kept: list[str] = []
        removed: collections.Counter[str] = collections.Counter()
        count = 0
        for line in map(str.strip, text.splitlines()):
            cited = _CITATION.sub("", line)
            small = cited.lower()
            reason = self._reason(line, cited)
            if reason is None and "lorem ipsum" in small:
                return Drop("lorem_ipsum")
            if reason is None and "javascript" in small:
                reason = "javascript"
            if reason is None and "{" in cited and not self.curly_brackets:
                return Drop("curly_bracket")
            if reason is None and any(policy in small for policy in _POLICIES):
                reason = "policy"
            if reason is not None:
                removed[f"line: {reason}"] += 1
                continue
            count += count_sentences(cited)
            kept.append(cited)
        if count < self.min_sentences:
            return Drop("too_few_sentences")
        changed = "\n".join(kept).strip()
        return text if changed == text else Edit(changed, removed or {"line: citations and spaces": 1})

    def _reason(self, line: str, cited: str) -> str | None:
        """Reason to remove a line for its form."""
        if any(len(word) > self.max_word_length for word in line.split()):
            return "too_long_word"
        if self.terminal_punctuation and (not cited.endswith((".", "?", "!", '"', "'")) or cited.endswith("...")):
            return "no_terminal_punc"
        return "too_few_words" if len(line.split()) < self.min_words_per_line else None


@dataclasses.dataclass(frozen=True)
class FineWebQuality(Step):
    """FineWeb's own rules: lines with punctuation, short lines, repeated characters, lists."""

    line_punct_ratio: float = 0.12
    """Smallest fraction of lines that end in a mark of punctuation."""
    short_line_ratio: float = 0.67
    """Largest fraction of short lines."""
    short_line_length: int = 30
    """Characters of a short line."""
    char_dup_ratio: float = 0.01
    """Largest fraction of characters in lines that occurred before."""
    new_line_ratio: float = 0.3
    """Largest number of line ends per word."""

    def __call__(self, text: str) -> str | Drop:
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return Drop("empty")
        if sum(line.endswith(STOPS) for line in lines) / len(lines) < self.line_punct_ratio:
            return Drop("line_punct_ratio")
        if sum(len(line) <= self.short_line_length for line in lines) / len(lines) > self.short_line_ratio:
            return Drop("short_line_ratio")
        if duplicates(lines)[1] / len(text.replace("\n", "")) > self.char_dup_ratio:
            return Drop("char_dup_ratio")
        if text.count("\n") / len(words(text)) > self.new_line_ratio:
            return Drop("list_ratio")
        return text
