"""Preference data: prompts, each with a reply that people chose and one that they rejected."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from gptjax.data import chat
from gptjax.data.chat import Conversation, ConversationTemplate, Message, conversation
from gptjax.data.dataset import Dataset
from gptjax.data.encoding import DROPPED, TRUNCATED, Encode, Encoded, RowError
from gptjax.data.files import file_state, find_files, read_json
from gptjax.data.packing import LabelledSequences, NoPacking, Packing, Pieces
from gptjax.data.sources import check_fraction, fingerprint, finite, of_split
from gptjax.data.store import Store
from gptjax.protocols import Split, Tokenizer
from gptjax.types import Batch, Json, PreferencePairs, UserError

log = logging.getLogger(__name__)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SIDES = ("chosen", "rejected")
Document = TypeVar("Document")


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two conversations that begin alike, with `prompt`, and end with different replies of the assistant."""

    prompt: Conversation
    chosen: Message
    rejected: Message
    margin: float = 0.0
    """Degree to which the chosen reply is better, for `BradleyTerry`: its reward should be higher by as much."""


@dataclasses.dataclass(frozen=True)
class PreferencesJsonl:
    """Preferences in JSON lines, one pair per line, with "chosen", "rejected" and perhaps "prompt" and a number
    "margin". Each side is a list of messages, or a text; without a prompt, lists that begin alike, or texts in the form
    of Anthropic's data, "\\n\\nHuman: ... \\n\\nAssistant: ...".

    Pairs with equal replies, with an empty one, or with different prompts are left out, and their number is logged."""

    path: str
    """A file, a glob, or an http(s) URL. Files may be gzipped (.gz)."""
    validation: float = 0.1
    """Fraction of the pairs held out for validation, chosen by a hash of the user's first message, so that no
    conversation is in both splits. 0: none."""
    invalid: Literal["error", "skip"] = "error"
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[Preference]:
        return of_split(self.keyed(), split, self.path, self.validation)

    def keyed(self) -> Iterator[tuple[str, Preference]]:
        """All pairs, each with its first message that is not the system's: pairs with one key are in one split."""
        for pair in read_rows(self.path, self.invalid, _pair, "pairs"):
            yield first_message(pair.prompt), pair

    def fingerprint(self) -> str:
        return fingerprint(self, *file_state(self.path))


def read_rows(
    path: str, invalid: Literal["error", "skip"], read: Callable[[Any], tuple[Document | None, str]], what: str
) -> Iterator[Document]:
    """Documents that `read` makes of rows of JSON; those that it leaves out are counted by its reason and logged.
    Raises UserError if it leaves out all."""
    left_out: dict[str, int] = {}
    kept = False
    for file in find_files(path):
        for where, row in read_json(file, invalid):
            try:
                document, reason = read(row)
            except UserError as error:
                raise UserError(f"path: {where}: {error}") from None
            if document is None:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                kept = True
                yield document
    if left_out and not kept:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise UserError(f"path: got {path}, all of whose {what} are left out: {reasons}; give others")
    for reason, count in left_out.items():
        log.warning("%s: left out %d %s with %s", path, count, what, reason)


def first_message(prompt: Conversation) -> str:
    """The first message that is not the system's, as JSON: replies to conversations that begin alike are in one
    split."""
    first = next((message for message in prompt if message.role != "system"), prompt[0])
    return json.dumps(first.as_json(), sort_keys=True)


def _pair(row: Json) -> tuple[Preference | None, str]:
    """The pair of a row, or None and the reason."""
    (prompt, chosen), (other, rejected) = (read_reply(row, name, _SIDES) for name in _SIDES)
    margin = finite(0 if row.get("margin") is None else row["margin"], "margin")
    if prompt != other:
        return None, "different prompts"
    if is_empty(chosen) or is_empty(rejected):
        return None, "an empty reply"
    if chosen.as_json() == rejected.as_json():
        return None, "equal replies"
    return Preference(prompt, chosen, rejected, margin), ""


def is_empty(reply: Message) -> bool:
    """True if the assistant says nothing and calls no tool."""
    return not (reply.text.strip() or reply.tool_calls)


def read_reply(row: Json, name: str, needed: Sequence[str]) -> tuple[Conversation, Message]:
    """Prompt and reply of the field `name` of a row, which must have the fields `needed`. Raises UserError."""
    if not isinstance(row, Mapping) or not set(needed) <= row.keys():
        found = f"the fields {', '.join(row)}" if isinstance(row, Mapping) else type(row).__name__
        raise UserError(f"got {found}, must have {' and '.join(map(json.dumps, needed))}")
    *prompt, reply = _conversation(row, name) or [Message("user", "")]
    if not prompt or reply.role != "assistant":
        raise UserError(f"{name}: got one without a prompt or an assistant's reply, must have both")
    return tuple(prompt), reply


def _conversation(row: Mapping[str, Any], name: str) -> Conversation:
    """The whole conversation of one reply."""
    prompt, reply = row.get("prompt"), row[name]
    if prompt is None and isinstance(reply, str):
        if not reply.startswith("\n\nHuman:"):
            raise UserError(f'{name}: got a text without a "prompt", must begin with "\\n\\nHuman:"')
        _, *parts = _TURN.split(reply)
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = zip(parts[::2], parts[1::2], strict=True)
        return tuple(Message(roles[speaker], text.strip()) for speaker, text in turns)
    if isinstance(reply, str):
        reply = [{"role": "assistant", "content": reply}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(reply, list) or not isinstance(prompt, list | None):
        raise UserError(f"{name}: got {type(reply).__name__}, must be a text or a list of messages")
    tools = row.get("tools")
    return conversation([*(prompt or []), *reply], json.loads(tools) if isinstance(tools, str) else tools)


@dataclasses.dataclass(frozen=True)
class Preferences(Dataset):
    """Pairs of replies to a prompt, one pair per sequence: the chosen conversation, then the rejected one, each with
    positions from 0 and without sight of the other. A data source is `PreferencesJsonl`. Targets are the replies.

    Of a pair that is longer than a sequence the oldest turns of the prompt are left out, but no system message; a reply
    is never cut: pairs that do not fit even so are left out and counted."""

    batch_type: ClassVar[type[Batch]] = PreferencePairs
    document_type: ClassVar[type | tuple[type, ...]] = Preference
    separator: ClassVar[str] = "\n"

    packing: Packing = NoPacking()
    """Packing of pairs into sequences: one per sequence."""
    template: ConversationTemplate | None = None
    """Chat template of the model, as in `Chat`. None: the format of `gptjax.data.chat`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing != NoPacking():
            raise UserError(f"packing: got {self.packing}, must be NoPacking(): a sequence has one pair")

    def encodings(self) -> tuple[Encode, ...]:
        return (PreferenceEncoder(self.length, self.template),)

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> LabelledSequences:
        (store,) = stores
        assert store.labels is not None
        chosen, margins = store.labels.T
        return LabelledSequences(store, TwoPieces(store.offsets, chosen.astype(np.int64)), margins, "margins")

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a conversation in which the user says `text`, up to the assistant's turn."""
        return chat.Chat(self.source, template=self.template).prompt(tokenizer, text)

    def texts_of(self, document: Preference) -> Iterable[str]:
        return (message.text for message in (*document.prompt, document.chosen, document.rejected))

    def empty(self, size: int) -> PreferencePairs:
        return PreferencePairs(**vars(super().empty(size)), margins=np.zeros(size, np.float32))


@dataclasses.dataclass(frozen=True)
class PreferenceEncoder:
    """Encoding of a pair as one document: the chosen conversation, then the rejected one. Its label is the length of
    the first, and the margin."""

    length: int
    """Maximum tokens of a pair."""
    template: ConversationTemplate | None = None
    """As in `Preferences`."""

    def __call__(self, documents: Iterator[Preference], tokenizer: Tokenizer) -> Iterator[Encoded]:
        for number, pair in enumerate(documents, 1):
            try:
                (chosen, rejected), note = rendered(
                    pair.prompt, (pair.chosen, pair.rejected), self.length, tokenizer, self.template
                )
            except UserError as error:
                raise RowError(number, str(error), "pair") from None
            label = float(len(chosen[0])), pair.margin
            yield Encoded(chosen[0] + rejected[0], chosen[1] + rejected[1], label=label, note=note)


def rendered(
    prompt: Conversation,
    replies: Sequence[Message],
    length: int,
    tokenizer: Tokenizer,
    template: ConversationTemplate | None,
) -> tuple[list[tuple[list[int], list[float]]], str | None]:
    """The conversation with each reply, as token ids and their weights as targets, and a note on its treatment. The
    oldest turns of the prompt are left out until all are at most `length` tokens together; if there is no other, all
    are empty."""
    render = chat.render if template is None else template.render
    context = tuple(dataclasses.replace(message, weight=0.0) for message in prompt)
    first = next((i for i, message in enumerate(context) if message.role != "system"), 0)
    starts = [first, *(i for i in range(first + 1, len(context)) if context[i].role == "user")]
    for start in starts:
        kept = (*context[:first], *context[start:])
        kept = (dataclasses.replace(kept[0], tools=context[0].tools), *kept[1:])
        found = [render((*kept, reply), tokenizer) for reply in replies]
        if sum(len(ids) for ids, _ in found) <= length:
            return found, None if start == first else TRUNCATED
    return [([], []) for _ in replies], DROPPED


@dataclasses.dataclass(frozen=True, eq=False)
class TwoPieces:
    """Plan of sequences of one pair each: sequence d is document d, in two pieces."""

    offsets: np.ndarray
    """int64 [D + 1], as in `Store`."""
    first: np.ndarray
    """int64 [D], tokens of the first piece, the chosen conversation."""

    def __len__(self) -> int:
        return len(self.first)

    def pieces(self, index: np.ndarray) -> Pieces:
        pair = index % len(self)
        start, end = self.offsets[pair], self.offsets[pair + 1]
        starts = np.stack([start, start + self.first[pair]], 1).reshape(-1)
        ends = np.stack([start + self.first[pair], end], 1).reshape(-1)
        row = np.repeat(np.arange(len(index)), 2)
        return Pieces(row, starts, ends - starts, np.zeros(len(row), bool))
