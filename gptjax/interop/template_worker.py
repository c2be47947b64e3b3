"""Program of the process that renders chat templates, started by `gptjax.interop.templates`. Templates come from the
network, and Jinja's sandbox limits neither time nor memory; a process can be limited, and ended, whatever runs in it.

    {"template": SOURCE}                             ->  {} or {"invalid": REASON}
    {"template": SOURCE, "variables": [{...}, ...]}  ->  {"texts": [TEXT, ...], "spans": [[[START, END], ...], ...]}
                                                         or {"refused": REASON} or {"limit": REASON}

The spans are those of a text's generation blocks.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CHARACTERS = 1 << 24
"""Length of a text."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around the text of a generation block while it is rendered: code points that Unicode keeps out of all text."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    kind = "invalid"
    try:
        template = _compile(request["template"])
        if "variables" not in request:
            return {}
        kind, texts, spans, size = "refused", [], [], 0
        if "generation" in request["template"] and _holds_marks(request["variables"]):
            return {"refused": "got the code point U+FDD0 or U+FDD1, which is no character"}
        for variables in request["variables"]:
            pieces = []
            for piece in template.generate(**variables):
                pieces.append(piece)
                size += len(piece)
                if size > CHARACTERS:
                    return {"limit": f"writes more than {CHARACTERS:,} characters"}
            text, found = _without_marks("".join(pieces))
            texts.append(text)
            spans.append(found)
        return {"texts": texts, "spans": spans}
    except MemoryError:
        raise
    except RecursionError:
        return {"limit": "is nested without end"}
    except Exception as error:  # whatever a template does, it is the template's doing
        return {kind: str(error) or type(error).__name__}


def _holds_marks(value: object) -> bool:
    """True if a text in a value has `OPEN` or `CLOSE`."""
    if isinstance(value, str):
        return OPEN in value or CLOSE in value
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_marks, inner))


def _without_marks(text: str) -> tuple[str, list[list[int]]]:
    """The text without `OPEN` and `CLOSE`, and the spans between them."""
    plain, spans, size = [], [], 0
    for piece in re.split(f"({OPEN}|{CLOSE})", text):
        if piece == OPEN:
            spans.append([size, size])
        elif piece == CLOSE:
            spans[-1][1] = size
        else:
            plain.append(piece)
            size += len(piece)
    return "".join(plain), spans


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """The template, in the environment of `transformers` (5.24), which templates rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "dict": Dict(),
        "namespace": PublicNamespace,
    }
    return environment.from_string(source)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's text: a scope with the same text, between
    `OPEN` and `CLOSE`."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return OPEN + caller().replace(OPEN, "").replace(CLOSE, "") + CLOSE


class Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class PublicNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
