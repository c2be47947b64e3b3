"""Hugging Face's `tokenizer.json`, read by the `tokenizers` library."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gptjax.data.tokenizers.tiktoken import byte_alphabet
from gptjax.data.tokenizers.tokenizer import Tokenizer, named
from gptjax.types import UserError

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE (GPT-2, Llama 3, Qwen) or one made from SentencePiece (Llama 2, Mistral).

    It normalises text where its file says so, and the second sort reads U+2581 as a space: then `decode(encode(text))`
    is the normalised text."""

    kind = "huggingface"
    file = "tokenizer.json"

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """A `tokenizer.json`, with the names of its first and last token from the `tokenizer_config.json` beside it.

        Raises `UserError` for another kind of file, for a model that is not a generator's (WordPiece), and for one that
        would read its special tokens from plain text."""
        path = Path(path)
        data = path.read_bytes()
        config_file = path.with_name("tokenizer_config.json")
        try:
            spec = json.loads(data)
            config = json.loads(config_file.read_bytes()) if config_file.exists() else {}
            added = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"tokenizer: got {path}, must be a Hugging Face tokenizer.json; it is damaged or of another kind"
            ) from None
        if not _decoders(spec) & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise UserError(
                f"tokenizer: got {path} with decoder {', '.join(sorted(_decoders(spec))) or None}, "
                "must be ByteLevel, ByteFallback or Metaspace"
            )
        # A config may leave the two unsaid: a model with one special token has it for both.
        sole = next(iter(added)) if len(added) == 1 else None
        bos, end = (_content(config.get(key)) or sole for key in ("bos_token", "eos_token"))
        tokenizer = cls(data, named(added, bos, end))
        for name in tokenizer.specials:
            if set(tokenizer.encode(name)) & set(tokenizer.specials.values()):
                raise UserError(
                    f"tokenizer: got {path}, which reads special token {name!r} in plain text, must not; use another"
                )
        return tokenizer

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        try:
            import tokenizers
        except ImportError:
            raise UserError("tokenizer: this one needs the tokenizers library; pip install 'gptjax[hf]'") from None
        tokenizer = tokenizers.Tokenizer.from_str(self.data.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as the text they are
        return tokenizer

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        tokenizer, spec = self._tokenizer, json.loads(self.data)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        pieces = [b""] * (1 + max(vocabulary.values()))
        alphabet = byte_alphabet()
        byte_level = "ByteLevel" in _decoders(spec)
        for piece, i in vocabulary.items():
            if byte_level:
                pieces[i] = bytes(alphabet[character] for character in piece if character in alphabet)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                pieces[i] = bytes([int(piece[3:5], 16)])
            else:
                pieces[i] = piece.replace("\u2581", " ").encode()
        for i, token in tokenizer.get_added_tokens_decoder().items():
            pieces[i] = b"" if token.special else token.content.encode()
        return pieces

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _decoders(spec: dict[str, Any]) -> set[str]:
    """The types of a tokenizer's decoder, or of each in the sequence."""
    decoder = spec.get("decoder") or {}
    return {part["type"] for part in decoder.get("decoders", [decoder]) if part}


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A token as `tokenizer_config.json` names it: its text, or an object that has it."""
    return token["content"] if isinstance(token, dict) else token
