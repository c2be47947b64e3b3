"""`gptjax data COMMAND`: look at training data, and prepare them.

gptjax data clean       clean files of texts, with a report
gptjax data prepare     tokenise before a run, in several processes or machines
gptjax data show        print sequences as the model will read them, with the trained tokens marked
gptjax data synthesise  write a model's replies to prompts made from rows

`gptjax data COMMAND --help` describes a command.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

COMMANDS = {
    "clean": "gptjax.cli.data_clean",
    "prepare": "gptjax.cli.data_prepare",
    "show": "gptjax.cli.data_show",
    "synthesise": "gptjax.cli.data_synthesise",
}
"""Command -> module, whose `main(arguments)` runs it and returns the exit code."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Raises UserError."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    if name not in COMMANDS:
        from gptjax.types import UserError

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; the nearest: {near[0]}" if near else ""
        raise UserError(f"no command 'data {name}'{hint}; see gptjax data --help")
    return importlib.import_module(COMMANDS[name]).main(rest)
