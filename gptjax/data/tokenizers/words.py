"""Byte-level BPE word by word: a text is split as GPT-2's pattern splits it (Radford et al. 2019), and each word is
encoded once and remembered.

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

The `tokenizers` library spends most of its time on the pattern: on one thread it takes 2 to 3 times as long where words
come again, and 1.4 times as long for the first 3 MB of a mixture. A text with a character that Unicode 3.2 did not
have, or whose class has changed, is left to the library.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

MOST = 1 << 18
"""Maximum number of words to remember; then all are forgotten."""
PATTERN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""The pre-tokenizer that splits so."""


class Words:
    """Ids of words, remembered.

    encode  ids of each of some texts, by the library
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]]):
        self._encode = encode
        self._known: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as the library has them."""
        split = [_words(text) for text in texts]
        if len(self._known) > MOST:
            self._known.clear()
        new = [*set().union(*filter(None, split)).difference(self._known)]
        others = [text for text, words in zip(texts, split, strict=True) if words is None]
        found = iter(self._encode(new + others))
        self._known.update(zip(new, found))  # noqa: B905 what is left is of the other texts
        ids = self._known.__getitem__
        return [
            next(found) if words is None else list(itertools.chain.from_iterable(map(ids, words))) for words in split
        ]


def splits(spec: dict[str, Any]) -> bool:
    """True for a tokenizer.json whose ids of a text are those of its words, split by the pattern."""
    part = spec.get("pre_tokenizer") or {}
    return (
        {name: part.get(name, True) for name in PATTERN} == PATTERN
        and spec.get("normalizer") is None
        and spec["model"].get("type", "BPE") == "BPE"
        and not spec["model"].get("dropout")
        and all(token.get("special") for token in spec["added_tokens"])
    )


def _words(text: str) -> list[str] | None:
    """Words of a text. None: it has other characters than those whose class is known."""
    known, word = _patterns()
    return word.findall(text) if known.fullmatch(text) else None


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Text of known characters; a word."""
    of: dict[str, list[int]] = {"L": [], "N": [], "S": [], "": []}  # code points by kind
    for code in range(0x10000):
        kind = _kind(code, unicodedata.category)
        if kind is not None and kind == _kind(code, unicodedata.ucd_3_2_0.category):
            of[kind].append(code)
    known, letter, number, space = map(_ranges, (sorted(itertools.chain(*of.values())), of["L"], of["N"], of["S"]))
    word = (
        rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )
    return re.compile(f"[{known}]*"), re.compile(word)


def _kind(code: int, category: Callable[[str], str]) -> str | None:
    """L for a letter, N for a number, S for a space, "" for others. None: no character."""
    found = category(chr(code))
    if found in ("Cn", "Cs", "Co"):
        return None
    return "S" if found[0] == "Z" or code in (*range(9, 14), 0x85) else found[0] if found[0] in "LN" else ""


def _ranges(codes: Sequence[int]) -> str:
    """Inside of a character class."""
    found: list[list[int]] = []
    for code in codes:
        if found and code == found[-1][1] + 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(rf"\u{first:04x}-\u{last:04x}" for first, last in found)
