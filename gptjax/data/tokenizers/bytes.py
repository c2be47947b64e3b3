"""Byte tokenizer: the 256 bytes of UTF-8, without a learned vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from gptjax.data.tokenizers.tokenizer import CHAT_SPECIALS, Tokenizer


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes as ids: 256 ids, then the special tokens."""

    specials: tuple[str, ...] = CHAT_SPECIALS
    """Special tokens, with ids from 256."""

    def build(self, texts: Iterator[str]) -> ByteTokenizer:
        """The tokenizer. `texts` is not read."""
        return ByteTokenizer(b"", {}).with_specials(self.specials)


class ByteTokenizer(Tokenizer):
    """Byte i has id i."""

    kind = "bytes"
    file = ""

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)]

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())
