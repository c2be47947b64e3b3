"""Sequences of a batch as text, to look at what a model reads and what it is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.dataset import Dataset
from gptjax.data.store import Store
from gptjax.protocols import Split, Tokenizer
from gptjax.types import AnswerSpans, Batch, Labelled, Pair, TokenLabelled

SAMPLED = 1024
"""Sequences of which the shares of trained tokens and of padding are counted."""
TRAINED, SPECIAL, FAINT, PLAIN = "\x1b[30;42m", "\x1b[1;36m", "\x1b[2m", "\x1b[0m"
"""Colours of a terminal."""
OPEN, CLOSE = "⟦", "⟧"
"""Marks around trained text where there are no colours."""


class Piece(NamedTuple):
    """Consecutive tokens of one document that are all targets of one weight, or all not."""

    segment: int
    """Document, counted from 1 in each sequence."""
    target: bool
    """True if the loss counts these tokens."""
    text: str
    weight: float = 1.0
    """Weight in the loss."""

    def __str__(self) -> str:
        weight = f" x {self.weight:g}" if self.target and self.weight != 1 else ""
        return f"{self.segment} {'target ' if self.target else 'context'}{weight} {self.text!r}"


def pieces(batch: Batch, tokenizer: Tokenizer, sequence: int = 0) -> list[Piece]:
    """Pieces of one sequence of a batch, special tokens by their names, without padding: `print(*pieces(...),
    sep="\\n")`. Of pairs, the sources are context; of labelled texts, all of the text is."""
    if isinstance(batch, Pair):
        found = []
        for segment in range(1, int(np.asarray(batch.segments)[sequence].max(initial=0)) + 1):
            sides = (batch.source, batch.source_segments, False), (batch.targets, batch.segments, True)
            for ids, of, target in sides:
                mine = np.asarray(ids)[sequence][np.asarray(of)[sequence] == segment]
                found.append(Piece(segment, target, _text(mine.tolist(), tokenizer)))
        return found
    tokens, weights, segments = _trained(batch, sequence)
    rows = zip(segments.tolist(), weights.tolist(), tokens.tolist(), strict=True)
    return [
        Piece(segment, weight > 0, _text([token for *_, token in group], tokenizer), weight or 1.0)
        for (segment, weight), group in itertools.groupby(rows, lambda row: row[:2])
        if segment
    ]


def _trained(batch: Batch, sequence: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a sequence, the weight of each as a target, and their segments, [T] each."""
    fields: list[Any] = [np.asarray(x)[sequence] for x in (batch.tokens, batch.weights, batch.segments)]
    tokens, weights, segments = fields
    if isinstance(batch, TokenLabelled):  # a weight is that of the token itself
        return tokens, weights, segments
    if isinstance(batch, AnswerSpans):
        _, first, last = np.asarray(batch.labels)[sequence]
        at = np.arange(len(tokens))
        return tokens, (1.0 * (first <= at) * (at <= last) * (first > 0)), segments
    # weights[t] is that of the token after tokens[t], in the same document.
    follows = np.concatenate([[0.0], np.where(segments[1:] == segments[:-1], weights[:-1], 0.0)])
    return tokens, follows * (not isinstance(batch, Labelled)), segments


def as_text(batch: Batch, tokenizer: Tokenizer, sequence: int = 0, colour: bool = False) -> str:
    """One sequence of a batch as a text, special tokens by their names, a line where a document begins, and trained
    text between ⟦ and ⟧ or, with `colour`, on a green ground. A weight that is not 1 stands behind its text."""
    lines: list[str] = []
    for segment, group in itertools.groupby(pieces(batch, tokenizer, sequence), lambda piece: piece.segment):
        title = f"--- document {segment} ---"
        lines.append(f"{FAINT}{title}{PLAIN}" if colour else title)
        text = ""
        for piece in group:
            if not piece.target:
                text += piece.text
                continue
            weight = "" if piece.weight == 1 else f"×{piece.weight:g}"
            text += f"{TRAINED}{piece.text}{PLAIN}{weight}" if colour else f"{OPEN}{piece.text}{CLOSE}{weight}"
        lines.append(text)
    if isinstance(batch, Labelled) and not isinstance(batch, AnswerSpans):
        found = np.asarray(batch.labels)[sequence, 0]
        label = f"class {found}" if np.issubdtype(found.dtype, np.integer) else f"number {found:g}"
        lines.append(f"{TRAINED}{label}{PLAIN}" if colour else f"{OPEN}{label}{CLOSE}")
    if padding := int((np.asarray(batch.segments)[sequence] == 0).sum()):
        lines.append(f"{FAINT}({padding} of padding){PLAIN}" if colour else f"({padding} of padding)")
    return "\n".join(lines)


def as_table(batch: Batch, tokenizer: Tokenizer, sequence: int = 0) -> str:
    """One sequence of a batch, a line for each token: index, segment, position, id, weight as a target, and text."""
    lines = [f"{'index':>6} {'segment':>7} {'position':>8} {'id':>8} {'weight':>6}  text"]
    if isinstance(batch, Pair):  # the decoder reads the targets shifted right
        tokens, weights, segments = (np.asarray(x)[sequence] for x in (batch.targets, batch.weights, batch.segments))
    else:
        tokens, weights, segments = _trained(batch, sequence)
    positions = np.asarray(batch.positions)[sequence]
    for index in np.flatnonzero(segments):
        at = f"{index:6} {segments[index]:7} {positions[index]:8} {tokens[index]:8} {weights[index]:6g}"
        lines.append(f"{at}  {_text([int(tokens[index])], tokenizer)!r}")
    return "\n".join(lines)


def statistics(data: Dataset, tokenizer: Tokenizer, split: Split, cache_dir: str) -> Iterator[str]:
    """Lines about a split: documents, tokens, lengths, how documents were treated, and the shares of trained tokens and
    of padding in its sequences. Documents are tokenised now unless stored."""
    for source in data.mix.sources:
        stores = data.stores(source, tokenizer, split, cache_dir)
        for store, encode in zip(stores, data.encodings(), strict=True):
            side = f" ({getattr(encode, '__name__', '').removeprefix('encode_')})" if len(stores) > 1 else ""
            yield from _of_store(store, f"{source}, {split}{side}", data.length)
    labelled = issubclass(data.batch_type, Labelled)
    batches = data.evaluation(tokenizer, split, cache_dir, sequences=SAMPLED)
    if batches is None:
        return
    trained = real = total = rows = 0
    for batch in batches:
        segments = np.asarray(batch.segments)
        used = segments.any(axis=1)
        trained += int((np.asarray(batch.weights) > 0).sum())
        real, total, rows = real + int((segments > 0).sum()), total + segments[used].size, rows + int(used.sum())
    targets = "the label of each" if labelled else f"{trained / real:.1%} of the tokens"
    yield f"of {rows:,} sequences of {data.length:,}, {1 - real / total:.1%} padding: trained {targets}"


def _of_store(store: Store, name: str, length: int) -> Iterator[str]:
    sizes = np.diff(store.offsets)
    yield f"{name}: {len(sizes):,} documents of {sizes.min():,} to {sizes.max():,} tokens, {sizes.sum():,} in all"
    if store.notes:
        yield f"  {', '.join(f'{count:,} {note}' for note, count in store.notes.items())}"
    if longer := int((sizes > length).sum()):
        yield f"  {longer:,} longer than a sequence"
    powers = np.ceil(np.log2(sizes)).astype(int)
    for power, count in zip(*np.unique(powers, return_counts=True), strict=True):
        bar = "#" * -(-40 * int(count) // len(sizes))
        yield f"  up to {2**power:>9,} tokens  {count:>10,}  {bar}"


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of ids, special tokens by their names."""
    names = {i: name for name, i in reversed(list(tokenizer.specials.items()))}
    groups = itertools.groupby(ids, key=names.get)
    return "".join(tokenizer.decode(group) if name is None else name * len(list(group)) for name, group in groups)
