"""`gptjax chat`: a conversation with a model in a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.data.chat import Message
    from gptjax.models.language_model import LanguageModel

COMMANDS = """\
/reset          start a new conversation
/system TEXT    start a new conversation with this system prompt; without TEXT: no system prompt
/save FILE      append the conversation to a .jsonl file
/help           show this list
/quit           leave, like Ctrl-D"""


class Chat:
    """A conversation in a terminal, or over a pipe: each line is a message, and only the answers are printed."""

    def __init__(self, model: LanguageModel, system: str | None, options: dict[str, Any]):
        self.model, self.options = model, options
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.reset(system)

    def reset(self, system: str | None) -> None:
        from gptjax.data.chat import Message

        self.system = system
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.left_out = 0

    def run(self) -> None:
        """Read messages and commands until the end of the input."""
        if self.terminal:
            with contextlib.suppress(ImportError):  # absent on Windows
                import readline  # noqa: F401  (gives input() editing and history)
            print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.\n")
        while True:
            try:
                line = input("> " if self.terminal else "").strip()
            except EOFError:
                if self.terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                print("\n(Ctrl-D leaves)")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.say(line)

    def say(self, text: str) -> None:
        """Send a message and show the answer."""
        from gptjax.data.chat import Message
        from gptjax.types import UserError

        messages = [*self.messages, Message("user", text)]
        try:
            _, left_out = self.model.trim(messages, self.options["max_tokens"], self.options["template"])
            if left_out > self.left_out:
                note(f"the oldest {left_out} messages no longer fit the model's context and are left out")
            options = {**self.options, "seed": self.options["seed"] + len(messages)}
            answer = show(self.model.stream_chat(messages, **options))
        except UserError as error:
            note(str(error))
            return
        if not answer:
            note("no answer; the message is not part of the conversation")
            return
        self.left_out = left_out
        self.messages = [*messages, Message("assistant", answer)]
        if self.terminal:
            print()

    def command(self, line: str) -> None:
        """Execute a line that starts with a slash."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            print(COMMANDS)
        elif name == "/reset":
            self.reset(self.system)
            note("a new conversation")
        elif name == "/system":
            self.reset(argument or None)
            note("a new conversation, " + ("with this system prompt" if argument else "without a system prompt"))
        elif name == "/save" and argument:
            self.save(Path(argument).expanduser())
        else:
            note(f"unknown command {line!r}; commands:\n{COMMANDS}")

    def save(self, path: Path) -> None:
        """Append the conversation as a line that `data.ChatJsonl` reads."""
        content = {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
        except OSError as error:
            note(f"not saved: {error}")
        else:
            note(f"{len(self.messages)} messages added to {path}")


def show(pieces: Generator[str, None, Any]) -> str:
    """Print the pieces as they come, until the end or Ctrl-C. Returns the printed text."""
    shown = []
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            shown.append(piece)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)
    return "".join(shown)


def note(text: str) -> None:
    """Print a message that is not the model's."""
    print(f"({text})", file=sys.stderr, flush=True)
