"""Probe for memorised training text: verbatim continuation (Carlini et al. 2023, arXiv:2202.07646).

Generative(Memorised(source), form="text")(lm)                          # share of documents continued verbatim
Generative(Memorised(source, split="validation"), form="text")(lm)      # of those that it has not seen
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from gptjax.data.chat import Conversation, Message
from gptjax.protocols import Source, Split
from gptjax.tasks.task import Generation, Reply, Score, Task
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Memorised(Task):
    """Documents of a source, of which the model gets the beginning. The outcome is 1 if it goes on as the document does
    for `length` characters; `parts` has the share of them before the first difference.

    Some texts are continued so by whoever knows the language: compare with the validation split."""

    source: Source
    """Source of texts that the model was trained on."""
    split: Split = "train"
    """Split of the documents."""
    documents: int = 100
    """Number of documents, the first of the split that are long enough."""
    prefix: int = 200
    """Number of characters that the model gets."""
    length: int = 50
    """Number of characters to be the same."""

    def __post_init__(self) -> None:
        for name in ("documents", "prefix", "length"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name}: got {value}, must be at least 1")

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """Beginnings of the documents. Raises UserError if none is long enough."""
        found: list[str] = []
        for text in self.source.documents(self.split):
            if isinstance(text, str) and len(text) >= self.prefix + self.length:
                found.append(text[: self.prefix + self.length])
            if len(found) == self.documents:
                break
        if not found:
            least = self.prefix + self.length
            raise UserError(f"prefix: {self.source} has no text of {least} characters in {self.split}; must be shorter")
        return tuple(found)

    @property
    def figure(self) -> str:
        return "memorised"

    def __len__(self) -> int:
        return len(self.texts)

    def example(self, i: int) -> Conversation:
        text = self.texts[i]
        return Message("user", text[: self.prefix]), Message("assistant", text[self.prefix :])

    def text(self, i: int) -> str:
        return self.texts[i][: self.prefix]

    def score(self, i: int, reply: Reply) -> Score:
        right = self.texts[i][self.prefix :]
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(right, reply.text, strict=False))
        same = len([*pairs])
        return Score(float(same == len(right)), parts={"same": same / len(right)})

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=self.length, text_stop=())
