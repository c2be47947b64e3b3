"""SentencePiece: train a vocabulary, BPE or unigram, on given text, or load a `.model` file.

Kudo and Richardson, "SentencePiece", 2018 (https://arxiv.org/abs/1808.06226).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from gptjax.data.tokenizers.tokenizer import REPLACEMENT, Tokenizer, add_roles, well_formed
from gptjax.types import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"
"""SentencePiece's symbol for a space, and so the one character that it would not decode."""
PRIVATE = range(0x100000, 0x10FFFE)
"""Private-use code points: one of them replaces a literal U+2581."""
CHUNK = 1_000
"""Maximum length, in characters, of a text encoded at once, approximately: BPE slows down with length."""


@dataclasses.dataclass(frozen=True)
class TrainSentencePiece:
    """Train a lossless tokenizer: no normalisation, bytes for characters outside the vocabulary."""

    vocab: int = 4_096
    """Number of ids: special tokens, 256 bytes and learned pieces. Short texts may give fewer."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """Training algorithm: "bpe" (much faster) or "unigram"."""
    characters: int = 10_000_000
    """Maximum number of characters to train on: every n-th document of those read."""
    read: int = 1_000_000_000
    """Maximum number of characters to read and sample from."""

    def build(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        """Train. The result is deterministic. Raises `UserError` for no text or a vocabulary too small."""
        import sentencepiece

        if self.kind not in ("bpe", "unigram"):
            raise UserError(f"kind: got {self.kind!r}, must be 'bpe' or 'unigram'")
        # SentencePiece's internal marker: it would skip documents that contain U+2585.
        chosen = [well_formed(text).replace("\u2585", "?") for text in self.sample(texts)]
        if not any(text.strip("\0") for text in chosen):
            raise UserError("texts: got no text, must have some to train a tokenizer on; check the source")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
                sentence_iterator=iter(chosen),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab,
                hard_vocab_limit=False,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 30,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                bos_piece="<|bos|>",
                eos_piece="<|end|>",
                # Not user_defined_symbols: those are matched in plain text, so a user could type them.
                control_symbols=["<|system|>", "<|user|>", "<|assistant|>"],
                minloglevel=2,
            )
        except RuntimeError as error:
            if needs := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
                raise UserError(
                    f"vocab: got {self.vocab}, must be at least {needs[1]} to hold the bytes, special tokens and "
                    "characters of this text; raise it"
                ) from None
            raise UserError(f"texts: SentencePiece cannot train on them ({error}); give more text") from None
        return SentencePieceTokenizer.from_model(model.getvalue())

    def sample(self, texts: Iterable[str]) -> list[str]:
        """Evenly spaced documents, in bounded memory: every second one is dropped when there are too many."""
        kept: list[str] = []
        size = seen = 0
        stride = 1
        for i, text in enumerate(texts):
            if i % stride == 0:
                kept.append(text[: self.characters])
                size += len(kept[-1])
            while size > self.characters and len(kept) > 1:
                kept, stride = kept[::2], stride * 2
                size = sum(map(len, kept))
            seen += len(text)
            if seen >= self.read:
                break
        return kept


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Its control symbols are the special tokens."""

    kind = "sentencepiece"
    file = "tokenizer.model"

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `.model` file. Raises `UserError` if it is not a SentencePiece model."""
        try:
            return cls.from_model(Path(path).read_bytes())
        except RuntimeError:
            raise UserError(
                f"tokenizer: got {path}, must be a SentencePiece model; it is damaged or of another kind"
            ) from None

    @classmethod
    def from_model(cls, data: bytes) -> Self:
        """Read the bytes of a `.model` file, with the special tokens that it declares."""
        processor = cls(data, {})._processor
        size = processor.get_piece_size()
        specials = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
        ids = {"<|bos|>": processor.bos_id(), "<|end|>": processor.eos_id(), "<|pad|>": processor.pad_id()}
        return cls(data, add_roles(specials, {role: processor.id_to_piece(i) for role, i in ids.items() if i >= 0}))

    @functools.cached_property
    def _processor(self) -> SentencePieceProcessor:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.data)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        processor = self._processor
        pieces = [processor.id_to_piece(i).replace(SPACE, " ").encode() for i in range(processor.get_piece_size())]
        for i, piece in enumerate(pieces):
            if processor.is_byte(i):
                pieces[i] = bytes([int(piece[3:-1], 16)])  # <0x41>
            elif processor.is_control(i):
                pieces[i] = b""
            elif processor.is_unknown(i):
                pieces[i] = REPLACEMENT.encode()
        return pieces

    @functools.cached_property
    def fallback(self) -> frozenset[int]:
        processor = self._processor
        return frozenset(i for i in range(len(self.pieces)) if processor.is_byte(i) or processor.is_unknown(i))

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {self.pieces[i][0]: i for i in self.fallback if self._processor.is_byte(i)}

    @functools.cached_property
    def _alphabet(self) -> frozenset[str]:
        return frozenset(b"".join(self.pieces).decode(errors="ignore"))

    @functools.cached_property
    def _divisible(self) -> bool:
        """True if text split before a space has the same encoding as the whole: a BPE model without spaces inside
        pieces, which neither adds nor removes spaces at the ends.

        BPE's scores are ranks. Unigram's are logarithms, whose sums break ties by the starting point of the text.
        """
        ranked = all(self._processor.get_score(i).is_integer() for i in range(len(self.pieces)))
        inside = any(b" " in piece.lstrip(b" ") for piece in self.pieces)
        return ranked and not inside and self.decode_bytes(self._processor.encode(" a ")) == b" a "

    def _encode(self, text: str) -> list[int]:
        if SPACE in text and self._byte_ids:
            return self._encode_literal(text)
        if len(text) > 2 * CHUNK and self._divisible:
            return [i for ids in self._processor.encode(list(_parts(text))) for i in ids]
        return self._processor.encode(text)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        plain = [text if SPACE not in text and len(text) <= 2 * CHUNK else "" for text in texts]
        batch = self._processor.encode(plain)
        return [
            ids if kept == text else self._encode(text) for text, kept, ids in zip(texts, plain, batch, strict=True)
        ]

    def _encode_literal(self, text: str) -> list[int]:
        """Encode with a stand-in for U+2581 that neither text nor vocabulary has, then replace its bytes."""
        taken = self._alphabet.union(text)
        stand_in = next(character for character in map(chr, PRIVATE) if character not in taken)
        wrong, right = ([self._byte_ids[byte] for byte in c.encode()] for c in (stand_in, SPACE))
        ids = self._encode(text.replace(SPACE, stand_in))
        result: list[int] = []
        i = 0
        while i < len(ids):
            found = ids[i] == wrong[0] and ids[i : i + len(wrong)] == wrong
            result.extend(right if found else ids[i : i + 1])
            i += len(wrong) if found else 1
        return result


def _parts(text: str) -> Iterator[str]:
    """Split before the first space of a run, every `CHUNK` characters or more."""
    cut = re.compile("[^ ](?= )")
    start = 0
    while match := cut.search(text, start + CHUNK):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]
