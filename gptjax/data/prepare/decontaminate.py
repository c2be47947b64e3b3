"""Decontamination: documents that hold an item of an evaluation are dropped."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.data.files import find_files, read_json, read_lines
from gptjax.data.prepare.steps import Drop, Step, Table
from gptjax.data.prepare.words import normal_words
from gptjax.data.tables import Csv, Parquet
from gptjax.types import Json, UserError

Item = tuple[tuple[str, ...], ...]
"""Fields of an item, such as question, options, answer; each is one or several texts."""
PRIME = np.uint64(0x100000001B3)
PROBED = 200
"""Items that the report's test injects."""


@dataclasses.dataclass(frozen=True)
class Decontaminate(Step):
    """Drops documents that have `longest` consecutive words of an item in common, or all of a shorter item: of a line
    of it with at least `shortest` words, or of its first lines together.

    Case, punctuation, line breaks and single letters, which label options, do not matter. Word sequences in more than
    `common` items are the prompt's frame, not the item, and are no evidence. The report has the share of items that the
    step finds when they are injected into a document, by the kind of injection."""

    paths: tuple[str, ...]
    """Files or globs with an item per row (.jsonl, .json, .csv, .tsv, .parquet) or per line (.txt)."""
    fields: tuple[str, ...] = ()
    """Columns with the texts of an item. Empty: all texts in a row."""
    longest: int = 13
    """Words of an n-gram that is evidence."""
    shortest: int = 8
    """Words of the shortest text that is evidence alone."""
    common: int = 10
    """Largest number of items with an n-gram that is evidence."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("paths: got none, must be files of evaluation items")
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"shortest: got {self.shortest}, must be from 1 to longest, {self.longest}")
        if self.common < 1:
            raise UserError(f"common: got {self.common}, must be at least 1")

    def __call__(self, text: str) -> str | Drop:
        found = _index(self).find(text)
        return text if found is None else Drop(f"contaminated: {found}")

    def files(self) -> tuple[str, ...]:
        return self.paths

    def appendix(self) -> Table:
        index = _index(self)
        rows = tuple((kind, found, of, found / of) for kind, (found, of) in probe(self, index.items).items() if of)
        short = f"; {index.unfindable:,} have no sequence of {self.shortest} words" if index.unfindable else ""
        return Table(
            f"Decontaminate: injected items found, of {len(index.items):,}{short}",
            ("injected", "found", "of", "recall"),
            rows,
        )


class Index(NamedTuple):
    """Hashes of the word sequences that are evidence."""

    items: list[Item]
    grams: Mapping[int, np.ndarray]
    """Number of words -> sorted hashes, uint64."""
    owners: Mapping[int, np.ndarray]
    """Number of words -> for each hash, the first item with it."""
    files: list[str]
    """Name of each item's file."""
    unfindable: int
    """Items without evidence."""

    def find(self, text: str) -> str | None:
        """Name of the file of an item in the text, or None."""
        hashes = _hashes(text)
        for n, known in self.grams.items():
            grams = _grams(hashes, n)
            at = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            if (hit := np.flatnonzero(known[at] == grams)).size:
                return self.files[self.owners[n][at[hit[0]]]]
        return None


@functools.lru_cache(maxsize=4)
def _index(step: Decontaminate) -> Index:
    """The index of the step's items, in this process."""
    items: list[Item] = []
    files: list[str] = []
    for path in (file for pattern in step.paths for file in find_files(pattern)):
        for item in read_items(path, step.fields):
            items.append(item)
            files.append(path.name)
    lines = [[[_hashes(line) for line in _lines(field)] for field in item] for item in items]
    # A sequence of `shortest` words in many items is a frame: what remains of a line are the parts between frames.
    framed = [_unique([_grams(line, step.shortest) for field in item for line in field]) for item in lines]
    values, counts = np.unique(np.concatenate(framed), return_counts=True)
    frames = values[counts > step.common]
    evidence: dict[int, list[tuple[int, np.ndarray]]] = collections.defaultdict(list)
    for number, item in enumerate(lines):
        parts = [[part for line in field for part in _without(line, frames, step.shortest)] for field in item]
        found: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        for sequence in _sequences(parts, step.longest):
            if len(sequence) >= step.shortest:
                n = min(len(sequence), step.longest)
                found[n].append(_grams(sequence, n))
        for n, grams in found.items():
            evidence[n].append((number, _unique(grams)))
    known, owners, findable = {}, {}, set()
    for n, of_items in sorted(evidence.items()):
        numbers = np.concatenate([np.full(len(grams), number) for number, grams in of_items])
        grams = np.concatenate([grams for _, grams in of_items])
        values, first, which, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
        own = counts <= step.common
        known[n], owners[n] = values[own], numbers[first][own]
        findable.update(numbers[own[which]].tolist())
    known = {n: grams for n, grams in known.items() if len(grams)}
    return Index(items, known, owners, files, len(items) - len(findable))


def read_items(path: Path, fields: Sequence[str]) -> Iterator[Item]:
    """The items of a file. Raises UserError for a row without these fields, or without text."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        rows = read_json(path)
    elif name.endswith((".csv", ".tsv", ".parquet")):
        rows = (Parquet if name.endswith(".parquet") else Csv)(str(path), validation=0.0).rows(path, None)
    else:
        rows = ((f"{path}:{number}", line.strip()) for number, line in read_lines(path) if line.strip())
    for where, row in rows:
        if fields and (not isinstance(row, Mapping) or not set(fields) <= row.keys()):
            found = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            raise UserError(f"fields: {where}: got {found}, must have {', '.join(fields)}")
        columns = row if isinstance(row, Mapping) else {"": row}
        values = [columns[field] for field in fields or columns]
        item = tuple(texts for value in values if (texts := tuple(_texts(value))))
        if not item:
            raise UserError(f"paths: {where}: got a row without a text, must be an item of an evaluation")
        yield item


def _texts(value: Json) -> Iterator[str]:
    """Texts inside a value, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _lines(field: tuple[str, ...]) -> Iterator[str]:
    for text in field:
        yield from (line for line in text.splitlines() if line.strip())


def _hashes(text: str) -> np.ndarray:
    """Hash of each normal word, without single Latin letters, in this process; uint64 [n]."""
    words = (word for word in normal_words(text) if len(word) > 1 or not ("a" <= word <= "z"))
    return np.array([hash(word) & 0xFFFFFFFFFFFFFFFF for word in words], np.uint64)


def _grams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash of each n consecutive words: sum_i hash_i prime^(n - 1 - i) mod 2^64."""
    grams = hashes[: max(0, len(hashes) - n + 1)].copy()
    for i in range(1, n if len(grams) else 1):
        grams = grams * PRIME + hashes[i : i + len(grams)]
    return grams


def _unique(arrays: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *arrays]))


def _without(words: np.ndarray, frames: np.ndarray, n: int) -> list[np.ndarray]:
    """Parts of a line between the frames."""
    outside = np.ones(len(words), bool)
    for start in np.flatnonzero(np.isin(_grams(words, n), frames)):
        outside[start : start + n] = False
    parts = np.split(words, np.flatnonzero(np.diff(outside)) + 1)
    kept = np.split(outside, np.flatnonzero(np.diff(outside)) + 1)
    return [part for part, keep in zip(parts, kept, strict=True) if keep.all() and len(part)]


def _sequences(fields: list[list[np.ndarray]], longest: int) -> Iterator[np.ndarray]:
    """Sequences of words that are evidence alone: each line, each field, the first lines of the item."""
    joined = np.zeros(0, np.uint64)
    for field in fields:
        yield from field
        if len(field) > 1:
            yield np.concatenate(field)
        for line in field:
            joined = np.concatenate([joined, line])
            if len(joined) <= longest:
                yield joined
    yield joined


def injections(item: Item, filler: str) -> dict[str, str]:
    """Documents with an item, by the kind of injection."""
    whole = "\n".join(text for field in item for text in field)
    options = next((field for field in item if len(field) > 1), ())
    question = "\n".join(item[0]) if item[0] is not options else ""
    labelled = " ".join(f"({chr(65 + i % 26)}) {text}" for i, text in enumerate(options))
    wrapped = textwrap.wrap(" ".join(whole.split()).upper(), 30)
    found = {
        "verbatim": whole,
        "re-wrapped, quoted, in capitals": "\n".join(f"> {line}" for line in wrapped),
        "embedded in a paragraph": f"{filler} {' '.join(whole.split())} {filler}",
        "the first field alone": f"{filler}\n{chr(10).join(item[0])}\n{filler}",
    }
    return found | ({"short options with other labels": f"{filler}\n{question} {labelled}"} if options else {})


def probe(find: Callable[[str], str | Drop], items: Sequence[Item]) -> dict[str, tuple[int, int]]:
    """Injection test of a step: kind of injection -> (number found, number injected)."""
    draw = random.Random(0)
    chosen = draw.sample(items, min(PROBED, len(items)))
    words = "so then they went over some hills and came again with many small things for one more day"
    counts: dict[str, tuple[int, int]] = {}
    for item in chosen:
        filler = " ".join(draw.choices(words.split(), k=40)).capitalize() + "."
        for kind, text in injections(item, filler).items():
            found, of = counts.get(kind, (0, 0))
            counts[kind] = found + isinstance(find(text), Drop), of + 1
    return counts
