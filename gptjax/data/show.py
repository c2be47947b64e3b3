"""Sequences of a batch as text, to look at what a model reads and what it is trained on."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from gptjax.protocols import Tokenizer
from gptjax.types import Batch


class Piece(NamedTuple):
    """Consecutive tokens of one document that are all targets, or all not."""

    segment: int
    """Document, counted from 1 in each sequence."""
    target: bool
    """True if the loss counts these tokens."""
    text: str

    def __str__(self) -> str:
        return f"{self.segment} {'target ' if self.target else 'context'} {self.text!r}"


def pieces(batch: Batch, tokenizer: Tokenizer, sequence: int = 0) -> list[Piece]:
    """Pieces of one sequence of a batch, special tokens by their names, without padding: `print(*pieces(...),
    sep="\\n")`."""
    fields: list[Any] = [np.asarray(x)[sequence] for x in (batch.tokens, batch.weights, batch.segments)]
    tokens, weights, segments = fields
    # weights[t] is that of the token after tokens[t], in the same document.
    follows = np.concatenate([[False], (segments[1:] == segments[:-1]) & (weights[:-1] > 0)])
    kinds = zip(segments.tolist(), follows.tolist(), strict=True)
    grouped = itertools.groupby(zip(kinds, tokens.tolist(), strict=True), key=lambda item: item[0])
    found = [(kind, [token for _, token in group]) for kind, group in grouped]
    return [Piece(*kind, _text(ids, tokenizer)) for kind, ids in found if kind[0]]


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of ids, special tokens by their names."""
    names = {i: name for name, i in reversed(list(tokenizer.specials.items()))}
    groups = itertools.groupby(ids, key=names.get)
    return "".join(tokenizer.decode(group) if name is None else name * len(list(group)) for name, group in groups)
