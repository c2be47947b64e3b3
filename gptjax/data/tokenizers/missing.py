"""The place of a tokenizer that a model's folder does not have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NoReturn

from gptjax.data.tokenizers.tokenizer import Tokenizer
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class MissingTokenizer(Tokenizer):
    """The ids of a model without their texts: all that reads or writes text raises `UserError`."""

    kind = "missing"
    file = ""

    size: int = 0
    """Number of ids."""

    @property
    def vocab(self) -> int:
        return max(self.size, 1 + max(self.specials.values(), default=-1))

    @functools.cached_property
    def pieces(self) -> NoReturn:
        raise missing()

    def _encode(self, text: str) -> NoReturn:
        raise missing()

    def decode_bytes(self, ids: Iterable[int]) -> NoReturn:
        raise missing()


def missing() -> UserError:
    """The error of a text for a model without a tokenizer."""
    return UserError("tokenizer: the model has none; give one: gptjax.load(path, tokenizer=folder)")
