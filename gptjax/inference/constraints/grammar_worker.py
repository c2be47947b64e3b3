"""Program of the process that tries grammars, started by `gptjax.inference.constraints.compiler`. Grammars come from
the network; a process can be limited, and ended, whatever compiling one takes.

    {"json_schema": SCHEMA}, {"regex": PATTERN}, {"choice": [TEXT, ...]}, {"ebnf": LARK OR GBNF},
    {"compound": {"lark": LARK, "parts": {NAME: one of these}}}
        ->  {"source": the grammar for `llguidance.LLMatcher`} or {"invalid": REASON} or {"limit": REASON}
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
from llguidance import grammar_from


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    try:
        source = json.dumps({"grammars": _grammars(request)})
        invalid = llguidance.LLMatcher.validate_grammar(source, None, limits=limits())
    except MemoryError:
        raise
    except RecursionError:
        return {"limit": "is nested without end"}
    except BaseException as error:  # a panic of Rust code is no Exception
        return {"invalid": str(error)}
    return {"invalid": invalid} if invalid and not invalid.startswith("WARNING") else {"source": source}


def _grammars(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The grammar, and those that it names."""
    ((kind, value),) = request.items()
    if kind != "compound":
        source = grammar_from(kind, value)  # pyright: ignore[reportArgumentType]
        return json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]
    found = [{"lark_grammar": value["lark"]}]
    for name, part in value["parts"].items():
        first, *others = _grammars(part)
        found += [{**first, "name": name}, *others]
    return found


def limits() -> llguidance.LLParserLimits:
    """Limits of the parser. States take 1 to 2 KB: a grammar's, some 50 MB."""
    return llguidance.LLParserLimits(max_lexer_states=30_000, max_grammar_size=100_000, verbose_errors=False)
