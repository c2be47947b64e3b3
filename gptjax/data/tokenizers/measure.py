"""Statistics of a tokenizer: bytes per token, share of fallback tokens, speed."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable

from gptjax.data.tokenizers.tokenizer import Tokenizer
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts over some texts. `print` shows a table."""

    bytes: int
    """UTF-8 bytes read."""
    characters: int
    tokens: int
    fallback: int
    """Tokens for less than a character, or for characters outside the vocabulary."""
    used: int
    """Ids that occur at least once."""
    vocab: int
    seconds: float
    """Time spent in `encode_batch`."""

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte is the loss in bits per token divided by this."""
        return self.bytes / self.tokens

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens

    @property
    def fallback_share(self) -> float:
        return self.fallback / self.tokens

    @property
    def megabytes_per_second(self) -> float:
        """10^6 bytes of text encoded per second."""
        return self.bytes / 1e6 / self.seconds

    def __str__(self) -> str:
        return "\n".join(
            [
                f"text                  {self.bytes:,} bytes, {self.characters:,} characters",
                f"tokens                {self.tokens:,}",
                f"bytes per token       {self.bytes_per_token:.3f}",
                f"characters per token  {self.characters_per_token:.3f}",
                f"byte fallback         {self.fallback_share:.2%} of tokens",
                f"vocabulary used       {self.used:,} of {self.vocab:,} ids ({self.used / self.vocab:.1%})",
                f"encoding speed        {self.megabytes_per_second:.1f} MB/s",
            ]
        )


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> Report:
    """Encode `texts` in small batches. Raises `UserError` if there are no tokens."""
    characters = size = tokens = fallback = 0
    seconds = 0.0
    seen: set[int] = set()
    _ = tokenizer.encode("a"), tokenizer.fallback  # lazy properties, so that they are not timed
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, 256)):
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(batch)
        seconds += time.perf_counter() - start
        characters += sum(map(len, batch))
        size += sum(len(text.encode(errors="replace")) for text in batch)
        tokens += sum(map(len, encoded))
        fallback += sum(i in tokenizer.fallback for ids in encoded for i in ids)
        seen.update(*encoded)
    if not tokens:
        raise UserError("texts: got no text, must have some to report on; check the source")
    return Report(size, characters, tokens, fallback, len(seen), tokenizer.vocab, seconds)
