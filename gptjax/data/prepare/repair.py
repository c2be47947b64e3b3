"""Repair of texts: broken encodings and Unicode normal forms; limits of length and lists of words."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from typing import Literal

from gptjax.data.files import find_files, read_lines
from gptjax.data.prepare.steps import Drop, Edit, Step
from gptjax.data.prepare.words import UNSPACED
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class FixEncoding(Step):
    """Repair of text that was decoded with the wrong encoding ("donâ€™t"), by ftfy. Quotes, ligatures and widths are
    left as they are."""

    def __call__(self, text: str) -> str | Edit:
        try:
            import ftfy
        except ImportError:
            raise UserError("steps: FixEncoding needs the ftfy library; pip install 'gptjax[data]'") from None
        config = ftfy.TextFixerConfig(
            unescape_html="auto",
            uncurl_quotes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            normalization=None,
        )
        fixed = ftfy.fix_text(text, config)
        return text if fixed == text else Edit(fixed, {"encoding": 1})


_SPACES = re.compile(r"[^\S\n]+")
_TRAILING = re.compile(r" +$", re.MULTILINE)
_LINES = re.compile(r"\n{3,}")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")


@dataclasses.dataclass(frozen=True)
class Normalise(Step):
    """Unicode normal form; no invisible characters; no space at the end of lines, and at most one empty line."""

    form: Literal["NFC", "NFKC"] = "NFC"
    """Unicode normal form. NFKC also replaces full-width letters, ligatures and superscripts."""
    indentation: bool = True
    """Keep spaces and tabs at the beginning of lines, as code needs them. False: runs of spaces become one."""

    def __call__(self, text: str) -> str | Edit:
        changed = unicodedata.normalize(self.form, text)
        changed = _INVISIBLE.sub("", changed.replace("\r\n", "\n").replace("\r", "\n"))
        if not self.indentation:
            changed = _SPACES.sub(" ", changed)
        changed = "\n".join(line.rstrip() for line in changed.split("\n"))
        changed = _LINES.sub("\n\n", changed).strip("\n")
        return text if changed == text else Edit(changed, {"normal_form": 1})


@dataclasses.dataclass(frozen=True)
class Length(Step):
    """Limits of a document's length in characters."""

    least: int = 200
    most: int = 1_000_000

    def __call__(self, text: str) -> str | Drop:
        if len(text) < self.least:
            return Drop("too_short")
        return Drop("too_long") if len(text) > self.most else text


@dataclasses.dataclass(frozen=True)
class WordList(Step):
    """Drops documents with a word or phrase of a list, in capitals or not: whole words, but anywhere in scripts without
    spaces, as in C4's list."""

    path: str
    """File with a word or phrase per line."""

    def __call__(self, text: str) -> str | Drop:
        return Drop("word_list") if _phrases(self.path).search(text.casefold()) else text

    def files(self) -> tuple[str, ...]:
        return (self.path,)


@functools.lru_cache(maxsize=8)
def _phrases(path: str) -> re.Pattern[str]:
    lines = (line.strip().casefold() for file in find_files(path) for _, line in read_lines(file))
    phrases = sorted({line for line in lines if line}, key=lambda line: (-len(line), line))
    if not phrases:
        raise UserError(f"path: got {path}, which has no word, must have one per line")
    unspaced = re.compile(f"[{UNSPACED}]")
    ways = [re.escape(p) if unspaced.search(p) else rf"(?<!\w){re.escape(p)}(?!\w)" for p in phrases]
    return re.compile("|".join(ways))
