"""Programs that a model completes, tested in a sandbox: HumanEval."""

from __future__ import annotations

import dataclasses
import functools
import re

from gptjax.data.chat import Conversation, Message
from gptjax.data.files import Where, field
from gptjax.tasks import sandbox
from gptjax.tasks.rows import read_items
from gptjax.tasks.task import Generation, Reply, Score, Task, unanswered
from gptjax.types import Json, UserError

ASKED = "Complete this Python function. Reply with the whole function in one code block.\n\n"
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to complete."""

    prompt: str
    """Its beginning, up to the end of its docstring, with all of its spaces and line ends."""
    solution: str
    """A right end."""
    test: str
    """Program with a function `check`, to be called with the function."""
    name: str
    """Name of the function."""


@dataclasses.dataclass(frozen=True)
class HumanEval(Task):
    """HumanEval (Chen et al. 2021, arXiv:2107.03374): {"prompt": ..., "canonical_solution": ..., "test": ...,
    "entry_point": ...}. The outcome is 1 if `check` raises nothing, in the sandbox of `gptjax.tasks.sandbox`.

    A conversation has the function in a code block. For a model that continues texts the prompt is the function itself,
    unchanged: without its last line end a model scores half. A reply with several versions of it has none."""

    path: str
    """File of the functions, a glob or a URL."""
    seconds: float = 10.0
    """Time that a program may take."""
    memory: int = 512
    """Memory of a program, in MiB."""
    unconfined: bool = False
    """True: run programs also where the system has no sandbox for them, with limits of time and memory alone."""

    @functools.cached_property
    def programs(self) -> tuple[Program, ...]:
        """All functions. Raises UserError, with file and line, for a row without one."""
        return read_items(self.path, _read)

    @property
    def figure(self) -> str:
        return "passed"

    def __len__(self) -> int:
        return len(self.programs)

    def example(self, i: int) -> Conversation:
        item = self.programs[i]
        whole = f"```python\n{item.prompt}{item.solution.rstrip()}\n```"
        return Message("user", f"{ASKED}```python\n{item.prompt}```"), Message("assistant", whole)

    def text(self, i: int) -> str:
        return self.programs[i].prompt

    def score(self, i: int, reply: Reply) -> Score:
        item = self.programs[i]
        if (code := completed(item, reply.text)) is None:
            return unanswered(reply)
        program = f"{code}\n{item.test}\ncheck({item.name})\n"
        found = sandbox.run(program, self.seconds, self.memory, self.unconfined)
        if found.status == "timed out":
            return Score(0.0, status="timed out", extracted=code, note=found.note)
        return Score(float(found.status == "passed"), extracted=code, note=found.note)

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=768, text_stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"))


def completed(item: Program, reply: str) -> str | None:
    """The program of a reply: its only code block that defines the function, a text that does, or the end of the
    prompt. None: there is none, or several."""
    blocks = FENCE.findall(reply)
    defines = re.compile(rf"^(?:async )?def {re.escape(item.name)}\b", re.MULTILINE)
    defining = [block for block in blocks if defines.search(block)]
    if len(defining) > 1:
        return None
    code = defining[0] if defining else blocks[0] if blocks else reply
    if not code.strip():
        return None
    if not defines.search(code):
        return item.prompt + code
    start = defines.search(item.prompt)  # before it are imports and functions that it needs
    return item.prompt[: start.start() if start else 0] + code


def _read(where: Where, row: Json) -> Program:
    item = Program(*(field(row, name) for name in ("prompt", "canonical_solution", "test", "entry_point")))
    if f"def {item.name}" not in item.prompt:
        raise UserError(f"entry_point: got {item.name}, must be a function that the prompt begins")
    return item
