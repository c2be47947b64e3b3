"""Blocks of a Markdown text that grows, each rendered once, when no later line can change it.

blocks = Blocks(lambda block, links: block.strip())
blocks.feed("# Title\\n\\nSome *te")        # ["# Title"]
blocks.rest                                # "Some *te"
blocks.feed("xt*", last=True)              # ["Some *text*"]
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.token import Token

SHORT = 10_000
"""Number of characters from which on an open block is looked at more seldom."""
T = TypeVar("T")


class Blocks(Generic[T]):
    """A text that grows.

    render  of a block, given its Markdown and the links that the text has defined so far
    """

    def __init__(self, render: Callable[[str, dict[str, Any]], T]):
        self._render = render
        self.rest = ""
        """The text after the finished blocks."""
        self._looked = 0
        self._links: dict[str, Any] = {}

    def feed(self, text: str, last: bool = False) -> list[T]:
        """Append text. Returns the blocks that it finished, rendered; `last` finishes all."""
        self.rest += text.replace("\r\n", "\n").replace("\r", "\n")
        whole = len(self.rest) if last else self.rest.rfind("\n") + 1
        # An open block is looked at whenever it has grown by a part of itself, which adds up to a few times its length.
        if not last and whole <= self._looked + self._looked // (10 if self._looked < SHORT else 1):
            return []
        lines = re.findall(r"[^\n]*\n|[^\n]+", self.rest[:whole])
        spans = self._spans(self.rest[:whole], len(lines), last)
        found = [self._render("".join(lines[first:end]), self._links) for first, end in spans]
        done = sum(map(len, lines[: spans[-1][1]])) if spans else 0
        self.rest, self._looked = self.rest[done:], whole - done
        return found

    def _spans(self, text: str, count: int, last: bool) -> list[tuple[int, int]]:
        """Lines [first, end) of the finished blocks of a text of so many lines. Each reaches to the next."""
        tokens = [t for t in _splitter().parse(text, self._links) if t.level == 0 and t.nesting >= 0 and t.map]
        if not tokens:
            return [(0, count)] if last and count else []
        starts = [0, *(token.map[0] for token in tokens[1:] if token.map), count]
        spans = list(itertools.pairwise(starts))
        return spans if last or _closed(tokens[-1], count) else spans[:-1]


def _closed(token: Token, count: int) -> bool:
    """True if no line after the first `count` can belong to the block."""
    first, end = token.map or (0, count)
    if token.type == "fence":
        return end - first == token.content.count("\n") + 2
    return token.type in ("heading_open", "hr") or (token.type == "paragraph_open" and end < count)


@functools.cache
def _splitter() -> MarkdownIt:
    return grammar().disable(["inline", "text_join"])


def grammar() -> MarkdownIt:
    r"""A parser of CommonMark without HTML, with tables, and with formulas from \[ to \] and from $$ to $$."""
    parser = MarkdownIt("js-default", {"html": False, "maxNesting": 20})
    interrupts = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("fence", "formula", _block_formula, {"alt": interrupts})
    return parser


def _block_formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    r"""Lines from \[ to \], or $$ to $$. A formula that is open at the end of the text ends there, as code does."""

    def line(i: int) -> str:
        return state.src[state.bMarks[i] + state.tShift[i] : state.eMarks[i]].rstrip()

    close = {"\\[": "\\]", "$$": "$$"}.get(line(start)[:2])
    if close is None or state.is_code_block(start):
        return False
    lines, after = [line(start)[2:]], start + 1
    while close not in lines[-1] and after < end:
        lines, after = [*lines, line(after)], after + 1
    content = "\n".join(lines)
    if "\n\n" in content or (close in content and content.index(close) != len(content) - 2):
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        token.content, token.map = content.removesuffix(close), [start, after]
    state.line = after
    return True
