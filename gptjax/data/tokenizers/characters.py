"""Character tokenizer: the vocabulary is the characters of its training text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from gptjax.data.tokenizers.tokenizer import CHAT_SPECIALS, REPLACEMENT, Tokenizer, well_formed
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class TrainCharacters:
    """One id for each distinct character of the training text, in order of code point."""

    specials: tuple[str, ...] = CHAT_SPECIALS
    """Special tokens, with the ids after the characters."""

    def build(self, texts: Iterator[str]) -> CharacterTokenizer:
        """Read all of `texts`. Raises `UserError` if they are empty."""
        characters: set[str] = set()
        for text in texts:
            characters.update(well_formed(text))
        if not characters:
            raise UserError(
                "texts: got no text, must have at least one character to train a tokenizer on; check the source"
            )
        data = "".join(sorted(characters - {REPLACEMENT})).encode()
        return CharacterTokenizer(data, {}).with_specials(self.specials)


class CharacterTokenizer(Tokenizer):
    """Id i is the i-th character of `data` (UTF-8). The next id is U+FFFD, for every other character."""

    kind = "characters"
    file = "characters.txt"

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.data.decode() + REPLACEMENT)}

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        return [character.encode() for character in self._ids]

    def _encode(self, text: str) -> list[int]:
        ids, unknown = self._ids, self._ids[REPLACEMENT]
        return [ids.get(character, unknown) for character in text]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self.encode(text), [(i, i + 1) for i in range(len(well_formed(text)))]
