"""Words, sentences and normal forms of texts, in languages with and without spaces.

A Chinese character or Japanese kana is a word of its own: n-grams of words are n-grams of characters there.
"""

from __future__ import annotations

import re
import unicodedata

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
UNSPACED = HAN + "\u3040-\u30ff"
"""Characters of scripts without spaces, as a class of a regular expression: Han and kana."""
STOPS = tuple(".?!。？！｡．﹒﹖﹗؟۔।॥‼‽⁇⁈⁉")
"""Characters that end a sentence."""

_SHORT = (
    "Mr|Mrs|Ms|Dr|St|vs|Inc|Jr|Prof|Co|Ltd|Corp|Gen|Gov|Rep|Rev|Sen|Bros|Messrs|Mt|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|"
    "Sept|Oct|Nov|Dec"
)
_WORD = re.compile(
    rf"""https?://\S+
    | [\w.+-]+@[\w-]+\.[\w.-]+\w
    | [{UNSPACED}]
    | \d+(?:[.,:]\d+)*
    | \.{{2,}}|-{{2,}}
    | (?:[A-Za-z]\.){{2,}}
    | (?:{_SHORT})\.(?=\s|$)
    | [^\W\d_{UNSPACED}]+?(?=n['’]t\b)
    | n['’]t\b
    | ['’](?:s|re|ve|ll|d|m|S)\b
    | [^\W{UNSPACED}]+
    | [^\w\s]""",
    re.VERBOSE,
)
_NORMAL = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Words and marks of punctuation, each a word of its own, much as spaCy's rules divide English."""
    return _WORD.findall(text)


def count_sentences(text: str) -> int:
    """Number of sentences. One begins with the first word after a mark that ends one."""
    count, ended = 0, True
    for word in words(text):
        if word in STOPS:
            ended, count = True, max(count, 1)
        elif ended and word[0].isalnum():
            ended, count = False, count + 1
    return max(count, bool(text.strip()))


def normal_words(text: str) -> list[str]:
    """Words of the text without regard to case, punctuation, white space, and compatibility forms (NFKC)."""
    return _NORMAL.findall(unicodedata.normalize("NFKC", text).casefold())


def n_grams(items: list[str], n: int) -> list[str]:
    """Each n consecutive items, joined by spaces. Fewer than n items are one n-gram."""
    return [" ".join(items[i : i + n]) for i in range(max(1, len(items) - n + 1))] if items else []
