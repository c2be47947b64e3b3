"""Program of the process that tries grammars, started by `gptjax.inference.constraints.compiler`. Grammars come from
the network; a process can be limited, and ended, whatever compiling one takes.

    {"json_schema": SCHEMA}, {"regex": PATTERN}, {"choice": [TEXT, ...]}, {"ebnf": LARK OR GBNF}
        ->  {"source": the grammar for `llguidance.LLMatcher`} or {"invalid": REASON} or {"limit": REASON}
"""

from __future__ import annotations

from typing import Any

import llguidance
from llguidance import grammar_from


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    ((kind, text),) = request.items()
    try:
        source = grammar_from(kind, text)  # pyright: ignore[reportArgumentType]
        invalid = llguidance.LLMatcher.validate_grammar(source, None, limits=limits())
    except MemoryError:
        raise
    except RecursionError:
        return {"limit": "is nested without end"}
    except BaseException as error:  # a panic of Rust code is no Exception
        return {"invalid": str(error)}
    return {"invalid": invalid} if invalid and not invalid.startswith("WARNING") else {"source": source}


def limits() -> llguidance.LLParserLimits:
    """Limits of the parser. States take 1 to 2 KB: a grammar's, some 50 MB."""
    return llguidance.LLParserLimits(max_lexer_states=30_000, max_grammar_size=100_000, verbose_errors=False)
