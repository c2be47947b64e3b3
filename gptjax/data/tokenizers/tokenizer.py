"""Base class of tokenizers: text to ids and back, saving, special tokens."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from gptjax import protocols
from gptjax.types import UserError

CHAT_SPECIALS = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Start of a document, the roles of a conversation, and the end of a message or document."""
ROLES = {
    "<|bos|>": ("bos_token", "cls_token"),
    "<|end|>": ("eos_token", "sep_token"),
    "<|mask|>": ("mask_token",),
    "<|pad|>": ("pad_token",),
}
"""Our names of the special tokens -> Hugging Face's, in decoders and in encoders. A token may have a name of its own
too."""
DESCRIPTOR = "gptjax_tokenizer.json"
"""File of a saved tokenizer with its kind and settings."""
REPLACEMENT = "\ufffd"


class TokenizerConfig(Protocol):
    """Configuration of a tokenizer, as a frozen dataclass: `TrainSentencePiece`, `LoadTokenizer`, ..."""

    def build(self, texts: Iterator[str]) -> Tokenizer:
        """Build the tokenizer, which may be trained on `texts`."""
        ...


def add_bos_eos(ids: Sequence[int], tokenizer: protocols.Tokenizer, append_eos: bool = True) -> list[int]:
    """Ids of a document between `bos` and `eos`, if the tokenizer has them. append_eos=False: without `eos`, to
    continue."""
    bos, eos = tokenizer.bos, tokenizer.eos if append_eos else None
    return [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]


def decoder_start(tokenizer: protocols.Tokenizer) -> int:
    """Start token of an encoder-decoder whose files do not name one: `bos`, or padding as in T5."""
    start = tokenizer.specials.get("<|pad|>") if tokenizer.bos is None else tokenizer.bos
    if start is None:
        raise UserError("tokenizer: got one without bos and padding, must have one: it starts a target")
    return start


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(abc.ABC):
    """Text to token ids and back. The fields are all there is to save, compare and send to another process; everything
    else is built from them on first use.

    Laws: `encode` never returns the id of a special token, for any text (so the token of text outside the vocabulary,
    [UNK] or <unk>, is not special, but a piece that decodes to U+FFFD); `decode_bytes(a + b) == decode_bytes(a) +
    decode_bytes(b)`; and, for a tokenizer that covers all of Unicode and does not normalise (bytes, tiktoken,
    SentencePiece as trained here), `decode(encode(text)) == text`.
    """

    kind: ClassVar[str]
    """Name of this class in a saved descriptor."""
    file: ClassVar[str]
    """File name of `data`. Empty: nothing to save."""

    data: bytes = dataclasses.field(repr=False)
    """Content of the model file."""
    specials: Mapping[str, int]
    """Name -> id. Several names may share one id: GPT-2's "<|endoftext|>" is also "<|bos|>" and "<|end|>"."""

    @functools.cached_property
    @abc.abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """Id -> its bytes, empty for special tokens."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Encode well-formed text."""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    @property
    def vocab(self) -> int:
        """Number of ids. Every id is below it."""
        return max(len(self.pieces), 1 + max(self.specials.values(), default=-1))

    @property
    def bos(self) -> int | None:
        """Id that starts a document, or None."""
        return self.specials.get("<|bos|>")

    @property
    def eos(self) -> int | None:
        """Id that ends a message or document, or None."""
        return self.specials.get("<|end|>")

    @functools.cached_property
    def fallback(self) -> frozenset[int]:
        """Ids for less than a character, or for characters outside the vocabulary."""
        return frozenset(i for i, piece in enumerate(self.pieces) if REPLACEMENT in piece.decode(errors="replace"))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens. Lone surrogates, which are not text, become U+FFFD."""
        return self._encode(well_formed(text))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on several threads if the library can."""
        return self._encode_batch([well_formed(text) for text in texts])

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, as from `encode`, and the characters [start, end) of the text that each stands for: spaces
        included, if the token has them. Parts of one character have the same span.

        Raises UserError if a text is changed before it is encoded, and the library does not say from where tokens
        come."""
        text = well_formed(text)
        ids = self._encode(text)
        found = self.decode_bytes(ids)
        added = len(self._prefix) if found == self._prefix + text.encode() else 0
        if found[added:] != text.encode():
            raise UserError(f"tokenizer: got a {self.kind} tokenizer that changes {text[:40]!r}; use another for spans")
        owners = [0] * added + [i for i, character in enumerate(text) for _ in character.encode()]
        spans, start = [], 0
        for i in ids:
            stop = start + len(self.pieces[i])
            inside = owners[max(start, added) : stop]  # the added space is no part of the text
            spans.append((inside[0], inside[-1] + 1) if inside else (owners[start], owners[start]))
            start = stop
        return ids, spans

    @functools.cached_property
    def pair_ids(self) -> tuple[list[int], list[int], list[int]]:
        """Ids before, between and after two texts that are read as one: `bos`, `eos` and `eos`; a line break between
        them if there is no `eos`."""
        bos, eos = ([] if i is None else [i] for i in (self.bos, self.eos))
        return bos, eos or self.encode("\n"), eos

    def strips(self, token: int) -> tuple[bool, bool]:
        """True if this special token, spelt out in a text, takes the spaces before and after it: RoBERTa's mask."""
        return False, False

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Concatenated bytes of `ids`. Special tokens and ids outside the vocabulary, such as padding of the embedding,
        have none."""
        pieces, size = self.pieces, len(self.pieces)
        return b"".join([pieces[i] for i in ids if 0 <= i < size])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without special tokens and without the space that some SentencePiece models put before all
        text. Invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).removeprefix(self._prefix).decode(errors="replace")

    @functools.cached_property
    def _prefix(self) -> bytes:
        return b" " if self.decode_bytes(self._encode("a")).startswith(b" ") else b""

    def with_specials(self, names: Iterable[str] = CHAT_SPECIALS) -> Self:
        """This tokenizer with new ids, after the vocabulary, for those of `names` that it lacks."""
        missing = [name for name in names if name not in self.specials]
        added = {name: self.vocab + i for i, name in enumerate(missing)}
        return dataclasses.replace(self, specials={**self.specials, **added})

    @property
    def _settings(self) -> dict[str, Any]:
        """All fields but `data`, as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "data"}
        return {"kind": self.kind} | fields | {"specials": dict(sorted(self.specials.items()))}

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that determines the tokenizer's behaviour."""
        return hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode() + b"\0" + self.data).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the model file and its descriptor, for `load_tokenizer(folder)`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file:
            (folder / self.file).write_bytes(self.data)
        descriptor = self._settings | {"fingerprint": self.fingerprint}
        (folder / DESCRIPTOR).write_text(json.dumps(descriptor, indent=2) + "\n", encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes rebuild the libraries' objects: not all of them can be pickled.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def well_formed(text: str) -> str:
    """Make `text` encodable as UTF-8: surrogate pairs joined, lone surrogates as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def add_roles(specials: Mapping[str, int], roles: Mapping[str, str | None]) -> dict[str, int]:
    """Add our names of `ROLES` to `specials`, unless taken. The `eos` token is never padding, though some files say so
    for lack of another."""
    found = {role: specials[name] for role, name in roles.items() if name is not None and name in specials}
    if found.get("<|pad|>") == found.get("<|end|>"):
        found.pop("<|pad|>", None)
    return found | dict(specials)
