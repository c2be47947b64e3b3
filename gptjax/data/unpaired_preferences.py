"""Unpaired preference data: replies that people found desirable or not, each to a prompt of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from gptjax.data import chat
from gptjax.data.chat import Conversation, ConversationTemplate, Message
from gptjax.data.dataset import Dataset
from gptjax.data.encoding import Encode, Encoded, RowError
from gptjax.data.files import file_state
from gptjax.data.packing import LabelledSequences, NoPacking, Packing
from gptjax.data.preferences import Preference, first_message, is_empty, read_reply, read_rows, rendered
from gptjax.data.sources import check_fraction, fingerprint, of_split
from gptjax.data.store import Store
from gptjax.protocols import Split, Tokenizer
from gptjax.types import Batch, LabelledReplies, UserError


@dataclasses.dataclass(frozen=True)
class LabelledReply:
    """A reply of the assistant to a prompt, and whether it is desirable."""

    prompt: Conversation
    reply: Message
    desirable: bool


@dataclasses.dataclass(frozen=True)
class UnpairedPreferencesJsonl:
    """Replies with labels in JSON lines: "prompt", "completion" and "label", which is true for a desirable reply.
    Prompt and completion are texts or lists of messages. Empty replies are left out, and their number is logged."""

    path: str
    """A file, a glob, or an http(s) URL. Files may be gzipped (.gz)."""
    validation: float = 0.1
    """Fraction of the replies held out for validation, chosen by a hash of the user's first message. 0: none."""
    invalid: Literal["error", "skip"] = "error"
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[LabelledReply]:
        return of_split(self.keyed(), split, self.path, self.validation)

    def keyed(self) -> Iterator[tuple[str, LabelledReply]]:
        """All replies, each with its first message that is not the system's: replies with one key are in one split."""
        for document in read_rows(self.path, self.invalid, _labelled, "replies"):
            yield first_message(document.prompt), document

    def fingerprint(self) -> str:
        return fingerprint(self, *file_state(self.path))


def _labelled(row: Any) -> tuple[LabelledReply | None, str]:
    """The reply of a row, or None and the reason."""
    prompt, reply = read_reply(row, "completion", ("prompt", "completion", "label"))
    if not isinstance(row["label"], bool):
        raise UserError(f"label: got {row['label']!r}, must be true or false")
    return (None, "nothing in them") if is_empty(reply) else (LabelledReply(prompt, reply, row["label"]), "")


@dataclasses.dataclass(frozen=True)
class UnpairedPreferences(Dataset):
    """Replies that are desirable or not, one per sequence. Targets are the replies. A data source is
    `UnpairedPreferencesJsonl`, or one of pairs, whose chosen replies are desirable and whose rejected ones are not.

    Of a conversation that is longer than a sequence the oldest turns of the prompt are left out, but no system message;
    a reply is never cut: those that do not fit even so are left out and counted."""

    batch_type: ClassVar[type[Batch]] = LabelledReplies
    document_type: ClassVar[type | tuple[type, ...]] = (LabelledReply, Preference)
    separator: ClassVar[str] = "\n"

    packing: Packing = NoPacking()
    """Packing of replies into sequences: one per sequence."""
    template: ConversationTemplate | None = None
    """Chat template of the model, as in `Chat`. None: the format of `gptjax.data.chat`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing != NoPacking():
            raise UserError(f"packing: got {self.packing}, must be NoPacking(): a sequence has one label")
        if self.batch < 2:
            raise UserError(
                f"batch: got {self.batch}, must be at least 2: KTO compares a reply with those to other prompts"
            )

    def encodings(self) -> tuple[Encode, ...]:
        return (LabelledReplyEncoder(self.length, self.template),)

    def packed(self, stores: Sequence[Store], tokenizer: Tokenizer) -> LabelledSequences:
        (store,) = stores
        assert store.labels is not None
        plan = self.packing.plan(store.offsets, self.length)
        return LabelledSequences(store, plan, store.labels, "desirable")

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a conversation in which the user says `text`, up to the assistant's turn."""
        return chat.Chat(self.source, template=self.template).prompt(tokenizer, text)

    def texts_of(self, document: LabelledReply | Preference) -> Iterable[str]:
        replies = (document.reply,) if isinstance(document, LabelledReply) else (document.chosen, document.rejected)
        return (message.text for message in (*document.prompt, *replies))

    def empty(self, size: int) -> LabelledReplies:
        return LabelledReplies(**vars(super().empty(size)), desirable=np.zeros(size, np.float32))


@dataclasses.dataclass(frozen=True)
class LabelledReplyEncoder:
    """Encoding of a reply with its prompt as one document, whose label is 1 for a desirable one; of a pair as two."""

    length: int
    """Maximum tokens of a conversation."""
    template: ConversationTemplate | None = None
    """As in `UnpairedPreferences`."""

    def __call__(self, documents: Iterator[LabelledReply | Preference], tokenizer: Tokenizer) -> Iterator[Encoded]:
        for number, document in enumerate(documents, 1):
            if isinstance(document, Preference):
                replies = ((document.chosen, 1), (document.rejected, 0))
            else:
                replies = ((document.reply, int(document.desirable)),)
            for reply, label in replies:
                try:
                    ((ids, weights),), note = rendered(document.prompt, (reply,), self.length, tokenizer, self.template)
                except UserError as error:
                    raise RowError(number, str(error), "reply") from None
                yield Encoded(ids, weights, label=label, note=note)
