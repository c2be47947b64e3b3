"""Conversations as documents: their messages as one text, which steps read and edit, and back.

The messages' texts are joined by lines with a character of the private use area. A step may drop the conversation or
edit the texts between these lines; the roles and all other fields of the row stay as they are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.data.prepare.decontaminate import Decontaminate
from gptjax.data.prepare.duplicates import ExactDuplicates, NearDuplicates
from gptjax.data.prepare.language import Language
from gptjax.data.prepare.personal import MaskPersonal
from gptjax.data.prepare.repair import FixEncoding, Length, Normalise, WordList
from gptjax.data.prepare.steps import CorpusStep, Step
from gptjax.types import UserError

MARK = "\ue000"
_BETWEEN = re.compile(f"\n?{MARK}\n?")
STEPS = (
    FixEncoding,
    Normalise,
    Language,
    Length,
    WordList,
    MaskPersonal,
    ExactDuplicates,
    NearDuplicates,
    Decontaminate,
)
"""Shipped steps that keep messages apart."""


def check_steps(steps: Sequence[Step | CorpusStep]) -> None:
    """Raise UserError for a shipped step that is not for conversations. One's own are checked by what they return."""
    for step in steps:
        if type(step).__module__.startswith("gptjax.") and not isinstance(step, STEPS):
            raise UserError(
                f"recipe: got {type(step).__name__}, which is for texts, must be one of "
                f"{', '.join(kind.__name__ for kind in STEPS)} for conversations, as in the recipe chat"
            )


def joined(messages: Any) -> str:
    """The texts of messages in the form of OpenAI or ShareGPT as one. Raises UserError for another form."""
    texts = [holder[key] for holder, key in _texts(messages)]
    if any(MARK in text for text in texts):
        raise UserError(f"got the character U+{ord(MARK):X} in a message, must not have it: it parts messages here")
    return f"\n{MARK}\n".join(texts)


def replaced(messages: Any, text: str) -> Any:
    """The messages with the texts of an edited document. Raises UserError if a step has lost one."""
    messages, texts = copy.deepcopy(messages), _BETWEEN.split(text)
    holders = [*_texts(messages)]
    if len(holders) != len(texts):
        raise UserError(
            f"recipe: a step made {len(texts)} messages of {len(holders)}, {text[:60]!r}; must keep the lines between"
        )
    for (holder, key), said in zip(holders, texts, strict=True):
        holder[key] = said
    return messages


def _texts(messages: Any) -> Iterator[tuple[Any, str]]:
    """(object, field) of each text in messages."""
    for message in messages:
        key = next((k for k in ("content", "value") if isinstance(message, dict) and k in message), None)
        if key is None:
            raise UserError(f"got the message {str(message)[:60]!r}, must have content, or value")
        if isinstance(message[key], str):
            yield message, key
        elif isinstance(message[key], list):
            yield from ((part, "text") for part in message[key] if isinstance(part.get("text"), str))
        elif message[key] is not None:  # null: the assistant only calls tools
            raise UserError(f"{key}: got {type(message[key]).__name__}, must be text")
