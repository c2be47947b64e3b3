"""Grammars: sets of allowed texts, as plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol

from gptjax.types import Json, UserError

SIZE, DEPTH, OPTIONS = 64 * 2**10, 64, 1_000
"""Maximum characters of a grammar, levels of a schema, and texts of a choice."""
SPACE = r"[ \n\t]{0,8}"
"""White space between the parts of JSON. Without a limit, models write it until their limit of tokens."""


class Grammar(Protocol):
    """A set of texts."""

    def request(self) -> dict[str, Any]:
        """The request to `grammar_worker.answer`. Raises UserError for a grammar that is too large."""
        ...


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """JSON that a schema (draft 2020-12) describes. Keywords that cannot be held are refused, not ignored."""

    schema: Mapping[str, Any]

    def request(self) -> dict[str, Any]:
        _check_depth(self.schema)
        options = {"whitespace_pattern": SPACE, "lenient": False}
        return _checked({"json_schema": {**self.schema, "x-guidance": options}})


@dataclasses.dataclass(frozen=True)
class Regex:
    """Texts that a regular expression matches as a whole, in the syntax of Rust's `regex` crate."""

    pattern: str

    def request(self) -> dict[str, Any]:
        return _checked({"regex": self.pattern})


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of these texts."""

    options: tuple[str, ...]

    def request(self) -> dict[str, Any]:
        if not self.options or not all(self.options):
            raise UserError("choice: got no text or an empty one, must be at least one, none of them empty")
        if len(self.options) > OPTIONS:
            raise UserError(f"choice: got {len(self.options)} texts, must be at most {OPTIONS}")
        return _checked({"choice": list(self.options)})


@dataclasses.dataclass(frozen=True)
class Ebnf:
    """Texts of a context-free grammar: llguidance's Lark (`start: "yes" | "no"`) or GBNF (`root ::= "yes" | "no"`)."""

    grammar: str

    def request(self) -> dict[str, Any]:
        return _checked({"ebnf": self.grammar})


@dataclasses.dataclass(frozen=True)
class Compound:
    """Texts of a grammar in llguidance's Lark, whose `@name` stands for a text of another one: parts of a reply."""

    lark: str
    parts: Mapping[str, Grammar]

    def request(self) -> dict[str, Any]:
        parts = {name: part.request() for name, part in self.parts.items()}
        return _checked({"compound": {"lark": self.lark, "parts": parts}})


def _checked(request: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(request))
    if size > SIZE:
        raise UserError(f"grammar: got {size:,} characters, must be at most {SIZE:,}")
    return request


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [inner for one in level for inner in _parts(one)]
        if not level:
            return
    raise UserError(f"schema: got one of more than {DEPTH} levels, must be at most {DEPTH}")


def _parts(value: Json) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
