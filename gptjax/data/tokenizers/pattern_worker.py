"""Program of the process that tries the regular expressions of a tokenizer.json, which come from the network and may
backtrack without end.

    {"pattern": PATTERN}  ->  {} or {"limit": REASON} or {"invalid": REASON}
"""

from __future__ import annotations

from typing import Any

import tokenizers

FEW, MANY = 64, 2_000
"""Equal characters in a text. Exponential backtracking ends with few, that of a cube with many."""
CHARACTERS = " \naA1!_\u00e9\u4e00"
"""One of each class that patterns tell apart."""


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The answer to a request."""
    pattern = request["pattern"]
    try:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    except Exception as error:  # the library raises no narrower class
        return {"invalid": str(error)}
    own = [c for c in dict.fromkeys(pattern) if c.isalnum() or ord(c) > 127][:16]
    for character in [*CHARACTERS, *own]:
        for end in "!a\0":
            for count in (FEW, MANY):
                try:
                    split.pre_tokenize_str(character * count + end)
                except BaseException as error:  # a panic of the library
                    return {"limit": f"backtracks without end ({error})"}
    return {}
