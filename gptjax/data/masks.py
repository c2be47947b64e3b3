"""Masks of personal data: addresses, numbers of telephones, cards and accounts. The service and cleaning share them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from gptjax.types import UserError

WORD = re.compile(r"[\dA-Za-z_.%+＋@():/\-–]+")
"""Characters of addresses and numbers."""
JOINS = re.compile(r".*\d.*|[A-Z]{4}|[().+＋/\-–]+")
"""Words that may go on after a space: groups of digits, and of letters in an IBAN."""
RUN = 400
"""Number of characters that are looked at together; an address has at most 320."""
ADDRESS = re.compile(r"[A-Za-z0-9_.%+\-]+@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)*\.[A-Za-z]{2,}")
ACCOUNT = re.compile(r"(?<![A-Za-z0-9])(?=([A-Za-z]{2}\d\d(?:[ \u00a0]?[A-Za-z0-9]){11,30}))")
CARD = re.compile(r"(?<!\d)(?=(\d{4}([ \u00a0-])\d{4}\2\d{4}\2\d{1,7}|\d{4}[ -]\d{6}[ -]\d{5}|\d{13,19})(?!\d))")


@dataclasses.dataclass(frozen=True)
class Mask:
    """Replaces e-mail addresses, telephone numbers that exist, and numbers of cards and bank accounts (IBAN) whose
    checksums are right."""

    region: str = "US"
    """Country, as ISO 3166 names it, of telephone numbers without a country code."""

    def __post_init__(self):
        import phonenumbers

        if self.region not in phonenumbers.SUPPORTED_REGIONS:
            raise UserError(f"mask_region: got {self.region!r}, must be a country's two letters, such as US, DE or CN")

    def border(self, text: str) -> int:
        """The beginning of what may still be a part of an address or a number."""
        start, open_at = 0, len(text)
        while (run := _run(text, start)) is not None:
            first, last, complete = run
            open_at = len(text) if complete else first
            start = last
        return open_at

    def __call__(self, text: str) -> str:
        """The text with masks."""
        parts, done = [], 0
        while (run := _run(text, done)) is not None:
            first, last, _ = run
            parts += [text[done:first], self._mask(text[first:last])]
            done = last
        return "".join([*parts, text[done:]])

    def _mask(self, run: str) -> str:
        if "@" in run:
            run = ADDRESS.sub("[e-mail]", run)
        for pattern, length, mask in ((ACCOUNT, _account, "[bank account]"), (CARD, _card, "[card]")):
            if _digits(run) >= 9:
                run = _replace(run, pattern, length, mask)
        if _digits(run) >= 5:
            import phonenumbers

            for found in reversed([*phonenumbers.PhoneNumberMatcher(run, self.region)]):
                run = f"{run[: found.start]}[telephone]{run[found.end :]}"
        return run


def _run(text: str, start: int) -> tuple[int, int, bool] | None:
    """Bounds of the next run of words that may be a number together, and True if nothing can be added to it."""
    match = WORD.search(text, start)
    if match is None:
        return None
    first = match.start()
    while True:
        if match.end() - first >= RUN:
            return first, first + RUN, True
        space = match.end()
        while space < len(text) and text[space] in " \u00a0" and space - match.end() < 2:
            space += 1
        if not JOINS.fullmatch(match[0]):
            return first, match.end(), match.end() < len(text)
        following = WORD.match(text, space) if space > match.end() else None
        if following is None:
            return first, match.end(), space < len(text)
        match = following


def _digits(text: str) -> int:
    return sum(map(str.isdecimal, text))


def _replace(text: str, pattern: re.Pattern[str], length: Callable[[str], int], mask: str) -> str:
    """The text with masks; of each candidate, so many characters are one. 0: it is none."""
    parts, done = [], 0
    for match in pattern.finditer(text):
        if match.start() >= done and (size := length(match[1])):
            parts += [text[done : match.start()], mask]
            done = match.start() + size
    return "".join([*parts, text[done:]])


def _account(text: str) -> int:
    """Length of the longest beginning that is an IBAN."""
    from stdnum import iban

    ends = (n for n in range(len(text), 14, -1) if text[n - 1].isalnum() and not text[n : n + 1].isalnum())
    return next((n for n in ends if iban.is_valid(text[:n].replace("\u00a0", " "))), 0)


def _card(text: str) -> int:
    """Length of the number of a card."""
    from stdnum import luhn

    digits = "".join(str(int(c)) for c in text if c.isdecimal())
    return len(text) if 13 <= len(digits) <= 19 and luhn.is_valid(digits) else 0
