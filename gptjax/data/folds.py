"""Folds of k-fold cross-validation: a source whose documents are divided anew, by the same hash as its own splits.

Fold i of k holds out the documents whose hash, as a fraction, is in [i / k, (i + 1) / k): folds are disjoint, and every
document is held out by one of them. Fold 0 of 10 is what `validation=0.1` holds out. Documents with one key stay
together: texts that are equal, pairs with one source, conversations with one first message of the user, and what the
source itself groups, if it has `keyed()`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, TypeVar

from gptjax.config import fields_of, is_config
from gptjax.data.chat import Conversation, Message
from gptjax.data.mix import Mix
from gptjax.data.sources import Example
from gptjax.protocols import Source, Split
from gptjax.types import UserError

Document = TypeVar("Document")
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Fold(Source[Document]):
    """One fold of a source, in place of its own splits."""

    source: Source[Document]
    """Source to divide: one with `keyed()`, or whose `validation` is a fraction that a hash of the document chooses."""
    index: int
    """Fold that is held out for validation, from 0."""
    count: int
    """Number of folds."""

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"folds: got {self.count}, must be at least 2")
        if not 0 <= self.index < self.count:
            raise UserError(f"fold: got {self.index}, must be from 0 to {self.count - 1}")
        _ = keyed(self.source)

    def documents(self, split: Split) -> Iterator[Document]:
        empty = True
        for key, document in keyed(self.source)():
            if (fold_of(key, self.count) == self.index) == (split == "validation"):
                empty = False
                yield document
        if empty:
            raise UserError(
                f"folds: fold {self.index} of {self.count} of {self.source} has no document for {split}; "
                "give more documents (one file without a separator is one), or fewer folds"
            )

    def questions(self, n: int) -> list[tuple[str, str]]:
        """Up to `n` questions of users in the validation split, each with the assistant's answer."""
        pairs = (pair for c in self._conversations() for pair in itertools.pairwise(c))
        asked = ((a.text, b.text) for a, b in pairs if (a.role, b.role) == ("user", "assistant") and b.text)
        return list(itertools.islice(asked, n))

    def _conversations(self) -> Iterator[Conversation]:
        documents: Iterator[Any] = self.documents("validation")
        return (document for document in documents if _is_conversation(document))

    def fingerprint(self) -> str:
        content = f"fold {self.index} of {self.count} of {self.source.fingerprint()}"
        return hashlib.sha256(content.encode()).hexdigest()


def fold_of(key: str, count: int) -> int:
    """Fold of `count` that holds out the documents with this key. A pure function of both."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") * count >> 64


def with_fold(config: Config, index: int, count: int) -> Config:
    """A configuration with each source in it, of training data and of evaluations, replaced by one of its folds. Raises
    UserError, with the path of the source, for one that has no folds."""
    return _with_fold(config, index, count, "")


def keyed(source: Any) -> Callable[[], Iterator[tuple[str, Any]]]:
    """Function () -> all documents of a source, each with its key. Raises UserError if they cannot be divided."""
    if hasattr(source, "keyed"):
        return source.keyed
    everything = _without_validation(source)
    return lambda: ((_key(document), document) for document in everything.documents("train"))


def _without_validation(source: Any) -> Any:
    """The source with all documents in its training split."""
    fields = {field.name: getattr(source, field.name) for field in fields_of(source)}
    if type(fields.get("validation")) in (int, float) and not hasattr(source, "store"):
        return dataclasses.replace(source, validation=0.0)
    if "table" in fields:
        return dataclasses.replace(source, table=_without_validation(fields["table"]))
    raise UserError(
        f"folds: got {type(source).__name__}, whose documents no hash divides, must be a source whose "
        "`validation` is a fraction, such as 0.1"
    )


def _key(document: object) -> str:
    """Key that documents which belong together share."""
    if isinstance(document, str):
        return document
    if isinstance(document, Example):
        return document.text
    if _is_conversation(document):
        return next((message.text for message in document if message.role == "user"), repr(document))
    return getattr(document, "source", repr(document))


def _is_conversation(document: object) -> TypeGuard[Conversation]:
    return isinstance(document, tuple) and all(isinstance(message, Message) for message in document)


def _with_fold(value: Any, index: int, count: int, path: str) -> Any:
    def inside(item: Any, name: object) -> Any:
        return _with_fold(item, index, count, f"{path}.{name}" if path else str(name))

    if is_config(value):
        if callable(getattr(value, "with_fold", None)):  # items of a task
            return value.with_fold(index, count)
        if callable(getattr(value, "documents", None)) and not isinstance(value, Mix):
            try:
                return Fold(value, index, count)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        return dataclasses.replace(value, **{f.name: inside(getattr(value, f.name), f.name) for f in fields_of(value)})
    if isinstance(value, tuple):
        return tuple(inside(item, i) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {name: inside(item, name) for name, item in value.items()}
    return value
