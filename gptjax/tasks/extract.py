"""Answers found in replies: numbers and labels of options, strictly and flexibly.

Strict extraction reads the answer in the form that the prompt asks for. A reply that names several different answers in
that form has none: naming all of them must not pay. Flexible extraction also takes an answer in another form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?<![\w.])[-+−]?[$€£¥]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?![\d])|(?<![\w.])[-+−]?\.\d+")
_MARKED = [
    re.compile(
        rf"{mark}\s*[*({{\[]*(?P<answer>{_NUMBER.pattern})(?P<others>[\s,;/|*)]*(?:or|and)?\s*(?:{_NUMBER.pattern}))?"
    )
    for mark in ("####", r"\b[Tt]he (?:final |correct )?answer is:?")
]


def number(text: str) -> Decimal | None:
    """The value of a number, compared as a number: 1,000 = 1000.0 = $1,000.00. None: the text is no number."""
    plain = re.sub(r"[,$€£¥%\s]", "", text).replace("−", "-").rstrip(".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def strict_number(text: str) -> Decimal | None:
    """The number after "####", or without such marks after "the answer is". None: there is none, there are several
    different ones, or others follow in the same place."""
    found = next((matches for mark in _MARKED if (matches := [*mark.finditer(text)])), [])
    values = {number(match["answer"]) for match in found}
    return values.pop() if len(values) == 1 and not any(match["others"] for match in found) else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None."""
    values = [number(match) for match in _NUMBER.findall(text)]
    return values[-1] if values else None


def strict_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that is the whole reply, "B", "(b)" or "B. its option", or follows "answer is". None: there is none, or
    several."""
    one = "|".join(map(re.escape, labels))
    begins = re.compile(rf"\s*[(\[*]*({one})(?:[)\]*.:]+(?=\s|$)|\s*$)", re.IGNORECASE)
    marked = re.compile(rf"answer is:?\s*[(\[*]*({one})(?![\w])", re.IGNORECASE)
    first = begins.match(text)
    found = {match.upper() for match in [*([first[1]] if first else []), *marked.findall(text)]}
    if len(found) != 1 or len(standalone_labels(text, labels)) > 1:
        return None
    return found.pop()


def standalone_labels(text: str, labels: Sequence[str]) -> set[str]:
    """Labels that stand alone in a text. The words "A" and "I" count only with a parenthesis, full stop or colon."""
    one = "|".join(map(re.escape, labels))
    pattern = re.compile(rf"(?<![\w'])({one})(?:(?=[)\]*.:,;])|(?=\s*$)|(?=\s+(?:or|and|[B-Z]\b)))")
    return {match.upper() for match in pattern.findall(text)}


def flexible_label(text: str, options: Sequence[tuple[str, str]]) -> str | None:
    """The only label that stands alone in a text, or that of the only option whose text it has. None: none, or several.

    options  (label, text) of each"""
    if strict := strict_label(text, [label for label, _ in options]):
        return strict
    said = standalone_labels(text, [label for label, _ in options])
    if not said:
        folded = f" {fold(text)} "
        said = {label for label, option in options if option and f" {fold(option)} " in folded}
    return said.pop().upper() if len(said) == 1 else None


def fold(text: str) -> str:
    """Lower case, without punctuation, with single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
