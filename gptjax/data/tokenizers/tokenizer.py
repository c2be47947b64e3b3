"""What every tokenizer is: text to ids and back, a file, and a name for each special token."""

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
"""Start of a document, the speakers of a conversation, and the end of a message or document."""
ROLES = {
    "<|bos|>": ("bos_token", "cls_token"),
    "<|end|>": ("eos_token", "sep_token"),
    "<|mask|>": ("mask_token",),
    "<|pad|>": ("pad_token",),
}
"""What we call the first and the last token of a document, the one that hides a token from an encoder, and padding ->
what Hugging Face's files do, of a model that writes and of an encoder. A token may have a name of its own beside."""
DESCRIPTOR = "gptjax_tokenizer.json"
"""The file of a saved tokenizer that says which kind it is."""
REPLACEMENT = "\ufffd"


class TokenizerConfig(Protocol):
    """A tokenizer to build, as a frozen dataclass: `TrainSentencePiece`, `LoadTokenizer`, ..."""

    def build(self, texts: Iterator[str]) -> Tokenizer:
        """The tokenizer; one that is trained reads the texts."""
        ...


def frame(ids: Sequence[int], tokenizer: protocols.Tokenizer, append_eos: bool = True) -> list[int]:
    """Ids of a document: `bos`, ids, `eos`, as far as the tokenizer has them. append_eos=False: one to go on with."""
    bos, eos = tokenizer.bos, tokenizer.eos if append_eos else None
    return [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]


def decoder_start(tokenizer: protocols.Tokenizer) -> int:
    """Token behind which an encoder-decoder writes, if its files do not name one: `bos`, or padding as in T5."""
    start = tokenizer.specials.get("<|pad|>") if tokenizer.bos is None else tokenizer.bos
    if start is None:
        raise UserError("tokenizer: got one without bos and padding, must have one: a target is written behind it")
    return start


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(abc.ABC):
    """Text to token ids and back. The fields are all there is to save, compare and send to another process;
    whatever is built from them is built on first use.

    Laws: `encode` never yields the id of a special token, whatever the text says (so what stands for text that the
    vocabulary does not cover, [UNK] or <unk>, is not special, but a piece that decodes to U+FFFD);
    `decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)`; and, for a tokenizer that covers all of Unicode and does
    not normalise (bytes, tiktoken, SentencePiece as trained here), `decode(encode(text)) == text`.
    """

    kind: ClassVar[str]
    """What the saved descriptor calls this class."""
    file: ClassVar[str]
    """The name that `data` is saved under; empty where there is none to save."""

    data: bytes = dataclasses.field(repr=False)
    """The content of the model file."""
    specials: Mapping[str, int]
    """Name -> id. Several names may share one id: GPT-2's "<|endoftext|>" is also "<|bos|>" and "<|end|>"."""

    @functools.cached_property
    @abc.abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """Id -> the bytes it stands for, empty for special tokens."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Encode well-formed text."""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    @property
    def vocab(self) -> int:
        """The number of ids: each is below this."""
        return max(len(self.pieces), 1 + max(self.specials.values(), default=-1))

    @property
    def bos(self) -> int | None:
        """The id that starts a document, if there is one."""
        return self.specials.get("<|bos|>")

    @property
    def eos(self) -> int | None:
        """The id that ends a message or document, if there is one."""
        return self.specials.get("<|end|>")

    @functools.cached_property
    def fallback(self) -> frozenset[int]:
        """The ids that stand for less than a character: what text costs that the vocabulary does not cover."""
        return frozenset(i for i, piece in enumerate(self.pieces) if REPLACEMENT in piece.decode(errors="replace"))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, no special token among them. Lone surrogates, which are not text, become U+FFFD."""
        return self._encode(well_formed(text))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on several threads where the library can."""
        return self._encode_batch([well_formed(text) for text in texts])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, joined. Special tokens and ids outside the vocabulary (models pad theirs) have none."""
        pieces, size = self.pieces, len(self.pieces)
        return b"".join([pieces[i] for i in ids if 0 <= i < size])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens dropped, invalid UTF-8 as U+FFFD, without the space that some
        SentencePiece models put before all text."""
        return self.decode_bytes(ids).removeprefix(self._prefix).decode(errors="replace")

    @functools.cached_property
    def _prefix(self) -> bytes:
        return b" " if self.decode_bytes(self._encode("a")).startswith(b" ") else b""

    def with_specials(self, names: Iterable[str] = CHAT_SPECIALS) -> Self:
        """This tokenizer with new ids after the vocabulary for those of `names` it lacks."""
        missing = [name for name in names if name not in self.specials]
        added = {name: self.vocab + i for i, name in enumerate(missing)}
        return dataclasses.replace(self, specials={**self.specials, **added})

    @property
    def _settings(self) -> dict[str, Any]:
        """All fields but `data`, as JSON knows them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "data"}
        return {"kind": self.kind} | fields | {"specials": dict(sorted(self.specials.items()))}

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that decides what this tokenizer does."""
        return hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode() + b"\0" + self.data).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the model file and its descriptor; `load_tokenizer(folder)` reads them back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file:
            (folder / self.file).write_bytes(self.data)
        descriptor = self._settings | {"fingerprint": self.fingerprint}
        (folder / DESCRIPTOR).write_text(json.dumps(descriptor, indent=2) + "\n", encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes rebuild what the libraries made: not all of it can be pickled.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def well_formed(text: str) -> str:
    """`text`, which has a UTF-8 form: surrogate pairs joined, lone surrogates as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def named(specials: Mapping[str, int], roles: Mapping[str, str | None]) -> dict[str, int]:
    """`specials`, with those that have one of `ROLES` known by that too, where it is free. What ends a text is no
    padding, though files may name it so for want of another."""
    found = {role: specials[name] for role, name in roles.items() if name is not None and name in specials}
    if found.get("<|pad|>") == found.get("<|end|>"):
        found.pop("<|pad|>", None)
    return found | dict(specials)
