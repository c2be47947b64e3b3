"""`gptjax chat`: a conversation with a model in a terminal."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from rich.console import Console

    from gptjax.cli.chat_models import ChatModel
    from gptjax.data.chat import Message

COMMANDS = """\
/reset          start a new conversation
/system TEXT    start a new conversation with this system prompt; without TEXT: no system prompt
/retry          replace the last answer by another
/model NAME     go on with another model: a path, or one of the server's; without NAME: list them
/save FILE      append the conversation to a .jsonl file
/help           show this list
/quit           leave, like Ctrl-D"""
ANOTHER = 1_000_003
"""Added to the seed for each answer that is replaced."""


class Chat:
    """A conversation in a terminal, or over a pipe: each line is a message, and only the answers are printed."""

    def __init__(self, model: ChatModel, system: str | None, options: dict[str, Any]):
        self.model, self.options = model, options
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.reset(system)

    def reset(self, system: str | None) -> None:
        from gptjax.data.chat import Message

        self.system = system
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.left_out = self.retries = 0

    def run(self) -> None:
        """Read messages and commands until the end of the input."""
        if self.terminal:
            with contextlib.suppress(ImportError):  # absent on Windows
                import readline  # noqa: F401  (gives input() editing and history)
            print(f"{self.model.name}: type a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.\n")
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
                self.retries = 0
                self.say(line)

    def say(self, text: str) -> bool:
        """Send a message and show the answer. False: there was none."""
        from gptjax.data.chat import Message
        from gptjax.types import UserError

        messages = [*self.messages, Message("user", text)]
        try:
            seed = self.options["seed"] + len(messages) + ANOTHER * self.retries
            left_out, pieces = self.model.reply(messages, {**self.options, "seed": seed})
            if left_out > self.left_out:
                note(f"the oldest {left_out} messages no longer fit the model's context and are left out")
            answer = show_markdown(pieces) if self.terminal else show(pieces)
        except UserError as error:
            note(str(error))
            return False
        if not answer:
            note("no answer; the message is not part of the conversation")
            return False
        self.left_out = left_out
        self.messages = [*messages, Message("assistant", answer)]
        return True

    def retry(self) -> None:
        """Ask for another answer to the last message."""
        if not self.messages or self.messages[-1].role != "assistant":
            note("there is no answer to replace")
            return
        before = self.messages
        self.messages, self.retries = before[:-2], self.retries + 1
        if not self.say(before[-2].text):
            self.messages = before

    def choose(self, name: str) -> None:
        """Go on with another model, or list them."""
        from gptjax.types import UserError

        try:
            if name:
                self.model.choose(name)
            for known in [self.model.name] if name else self.model.names():
                note(f"{known}{', which answers now' if known == self.model.name else ''}")
        except UserError as error:
            note(str(error))

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
        elif name == "/retry":
            self.retry()
        elif name == "/model":
            self.choose(argument)
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


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters with which a text could command the terminal."""


def show_markdown(pieces: Generator[str, None, Any], console: Console | None = None) -> str:
    """Print a text as Markdown, block by block, until its end or Ctrl-C: the open block as it is, below the finished
    ones. Returns the text."""
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown
    from rich.padding import Padding
    from rich.text import Text

    from gptjax.serve.blocks import Blocks

    console = console or Console()
    blocks = Blocks(lambda block, links: Padding(Markdown(block, hyperlinks=False), (0, 0, 1, 0)))
    shown = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            for piece in pieces:
                shown.append(piece)
                done = blocks.feed(CONTROLS.sub("\ufffd", piece))
                live.update(Text("\n".join(blocks.rest.split("\n")[2 - console.height :])), refresh=not done)
                for block in done:
                    console.print(block)  # above the open one
        except KeyboardInterrupt:
            pieces.close()
        live.update(Text(), refresh=True)
    for block in blocks.feed("", last=True):
        console.print(block)
    return "".join(shown)


def note(text: str) -> None:
    """Print a message that is not the model's."""
    print(f"({text})", file=sys.stderr, flush=True)
