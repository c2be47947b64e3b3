"""Built-in corpus as two sources: Python's own documentation for pretraining, and conversations about it.

Its data set is built from the running Python by `pydocs_builder` on first use, in a few seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gptjax.protocols import Split

if TYPE_CHECKING:
    from gptjax.data.chat import Conversation
    from gptjax.data.pydocs_builder import Doc

SPLITS: tuple[Split, ...] = ("train", "validation")
LIMIT = 300
"""Maximum length of an answer, in characters."""
QUESTIONS = {
    "function": ("What does {} do?", "Explain {}.", "How do I use {}?", "What is {} for?"),
    "class": ("What is {}?", "Explain the class {}.", "What does the class {} do?", "What is {} for?"),
    "module": ("What is the module {} for?", "What does the module {} do?", "Explain the module {}."),
    "topic": ("Explain {}.", "Tell me about {}.", "What should I know about {}?"),
}
SIGNATURE_QUESTIONS = ("What are the arguments of {}?", "How do I call {}?", "What is the signature of {}?")
FOLLOW_UPS = ("What are its arguments?", "How do I call it?", "And its arguments?")
SENTENCES = re.compile(r"(?<=[.!?])(?<![ei]\.[ge]\.) +(?=[A-Z\"'(`])")
ENDED = re.compile(r"[.!?][\"')]*$")
NOT_PROSE = re.compile(
    r"::=|<instance>|^ *[-=*~^+]{3,}|^[\w.]+\(.*\)( *->.*)?$|^[\w.]+\(.*->|\S {3,}\S",
    re.MULTILINE,
)
LISTED = re.compile(r"\s|[-*+|:@#$>]|\d+[.)] |[\w, ]+ -- ")


@dataclasses.dataclass(frozen=True)
class PyDocs:
    """Documentation in every CPython: the language reference by topic, and the standard library's docstrings, each
    under its signature. About 2 million characters, no network needed."""

    data_dir: str | None = None
    """Folder of the built data set. None: datasets/ in the cache folder ($GPTJAX_CACHE, else ~/.cache/gptjax)."""
    root: str | None = None
    """Folder of Python files, such as your own project, to read instead of the standard library and the topics. None:
    those."""

    def documents(self, split: Split) -> Iterator[str]:
        for doc in _docs(self, split):
            yield _page(doc)

    def keyed(self) -> Iterator[tuple[str, str]]:
        """All documents, each with the key whose hash decides about its split."""
        return ((doc.key, _page(doc)) for split in SPLITS for doc in _docs(self, split))

    def fingerprint(self) -> str:
        return _content(self)


@dataclasses.dataclass(frozen=True)
class PyDocsChat:
    """Questions about the same documentation, with answers quoted from it: what a function does and how it is called.
    No training conversation is about a name that `PyDocs` holds out for validation."""

    data_dir: str | None = None
    """Folder of the built data set. None: datasets/ in the cache folder ($GPTJAX_CACHE, else ~/.cache/gptjax)."""
    root: str | None = None
    """Folder of Python files, such as your own project, to read instead of the standard library and the topics. None:
    those."""

    def documents(self, split: Split) -> Iterator[Conversation]:
        for doc in _docs(self, split):
            yield from conversations(doc)

    def keyed(self) -> Iterator[tuple[str, Conversation]]:
        """All conversations, each with the key whose hash decides about its split: that of the documentation."""
        return ((doc.key, chat) for split in SPLITS for doc in _docs(self, split) for chat in conversations(doc))

    def questions(self, n: int) -> list[tuple[str, str]]:
        """Up to `n` validation questions, each with the documentation's answer."""
        first = (chat for doc in _docs(self, "validation") for chat in conversations(doc)[:1])
        return [(chat[0].text, chat[1].text) for chat in itertools.islice(first, n)]

    def fingerprint(self) -> str:
        return _content(self)


def conversations(doc: Doc) -> list[Conversation]:
    """Conversations about a public name: two phrasings of "what is it", the first sometimes followed by a question
    about the arguments, and sometimes that question alone. A hash of the name decides."""
    from gptjax.data.chat import Message

    explanation = answer(doc.text)
    if not explanation or any(part.startswith("_") for part in doc.name.split(".")):
        return []
    dice = int.from_bytes(hashlib.sha256(doc.name.encode()).digest()[:8], "big")
    subject = _title(doc) if doc.kind == "topic" else doc.name
    questions = [_choose(QUESTIONS[doc.kind], dice // 8 + turn).format(subject) for turn in (0, 1)]
    first, second = [(Message("user", question), Message("assistant", explanation)) for question in questions]
    if not doc.signature or len(doc.signature) > LIMIT // 2:
        return [first, second]
    call = Message("assistant", f"Call it as {doc.signature}.")
    if dice % 4 == 0:
        first += (Message("user", _choose(FOLLOW_UPS, dice // 8)), call)
    alone = (Message("user", _choose(SIGNATURE_QUESTIONS, dice // 8).format(doc.name)), call)
    return [first, second, alone] if dice % 2 else [first, second]


def answer(text: str) -> str:
    """First sentences of a docstring as one paragraph of at most `LIMIT` characters, or "" if it does not begin with
    prose."""
    sentences, room = [], LIMIT
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        prose = _prose(paragraph)
        if not prose and sentences:
            break
        for sentence in SENTENCES.split(prose):
            room -= len(sentence) + 1
            if room >= 0 and sentence:
                sentences.append(sentence)
    # A sentence that announces an omitted list or example ("For instance:") cannot be the last one.
    while sentences and not ENDED.search(sentences[-1]) and (len(sentences) > 1 or sentences[0].endswith(":")):
        sentences.pop()
    said = " ".join(sentences)
    if len(said) < 10:
        return ""
    said = said[0].upper() + said[1:] if re.match(r"[a-z]+ ", said) else said
    return said if ENDED.search(said) else f"{said}."


def _prose(paragraph: str) -> str:
    """A paragraph as one line, up to a list or example in it, or "" for headings, signatures, tables and grammar."""
    if NOT_PROSE.search(paragraph):
        return ""
    lines = itertools.takewhile(lambda line: not LISTED.match(line), paragraph.split("\n"))
    return " ".join(" ".join(lines).split())


def _choose(options: Sequence[str], dice: int) -> str:
    return options[dice % len(options)]


def _title(doc: Doc) -> str:
    """A topic's heading, as used within a sentence: 'the "assert" statement'."""
    return doc.text.split("\n", 1)[0].strip().lower()


def _page(doc: Doc) -> str:
    return f"{doc.text}\n" if doc.kind == "topic" else f"# {_heading(doc)}\n\n{doc.text}\n"


def _heading(doc: Doc) -> str:
    called = doc.signature or doc.name
    return called if doc.kind == "function" else f"{doc.kind} {called}"


def _docs(source: PyDocs | PyDocsChat, split: Split) -> Iterator[Doc]:
    from gptjax.data.pydocs_builder import load  # imports tensorflow_datasets

    return (doc for doc in load(source.data_dir, source.root) if doc.split == split)


def _content(source: PyDocs | PyDocsChat) -> str:
    """SHA-256, in hex, of all documents: independent of their location, different for each Python version."""
    content = hashlib.sha256()
    for split in SPLITS:
        for document in source.documents(split):
            content.update(f"{split} {document!r}\n".encode())
    return content.hexdigest()
