"""Rules for Chinese, which has no spaces: characters take the place of words."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from gptjax.data.prepare.gopher import GopherRepetition, Limits
from gptjax.data.prepare.steps import Drop, Step
from gptjax.data.prepare.words import HAN

_HAN = re.compile(f"[{HAN}]")
_END = tuple("。！？…；：.!?;:”」』）)》")


@dataclasses.dataclass(frozen=True)
class ChineseQuality(Step):
    """Fractions of Chinese characters and of lines with punctuation."""

    min_characters: int = 100
    """Smallest number of Chinese characters."""
    min_fraction: float = 0.6
    """Smallest fraction of Chinese characters among all that are not spaces."""
    line_punct_ratio: float = 0.12
    """Smallest fraction of lines that end in a mark of punctuation, Chinese or Latin."""
    short_line_ratio: float = 0.67
    """Largest fraction of short lines."""
    short_line_length: int = 10
    """Characters of a short line."""
    max_ellipses: float = 0.05
    """Largest number of ellipses per Chinese character."""

    def __call__(self, text: str) -> str | Drop:
        count = len(_HAN.findall(text))
        if count < max(1, self.min_characters):
            return Drop("chinese_short_doc")
        if count / len("".join(text.split())) < self.min_fraction:
            return Drop("chinese_fraction")
        if len(re.findall(r"…+|\.{3,}|。{3,}", text)) / count > self.max_ellipses:
            return Drop("chinese_too_many_ellipsis")
        lines = [line.rstrip() for line in text.split("\n") if line.strip()]
        if sum(line.endswith(_END) for line in lines) / len(lines) < self.line_punct_ratio:
            return Drop("chinese_line_punct_ratio")
        if sum(len(line) <= self.short_line_length for line in lines) / len(lines) > self.short_line_ratio:
            return Drop("chinese_short_line_ratio")
        return text


@dataclasses.dataclass(frozen=True)
class ChineseRepetition(GopherRepetition):
    """Gopher's rules of repetition over characters. A Chinese word has about two of them, so each n is doubled."""

    _joint: ClassVar[str] = ""
    _least: ClassVar[int] = 2

    top_n_grams: Limits = ((4, 0.2), (6, 0.18), (8, 0.16))
    dup_n_grams: Limits = ((10, 0.15), (12, 0.14), (14, 0.13), (16, 0.12), (18, 0.11), (20, 0.10))
