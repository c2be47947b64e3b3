"""Sources of text that take no files, and checks of batches."""

import dataclasses
import itertools

import jax
import numpy as np

from gptjax.data.chat import Message
from gptjax.data.tokenizers import Bytes
from gptjax.types import Batch

BYTES = Bytes().build(iter(()))


BOS, END = BYTES.bos, BYTES.eos


@dataclasses.dataclass(frozen=True)
class Letters:
    """Documents of one letter repeated, each with its own ending, 1 to 40 long."""

    count: int = 37
    letter: str = "a"
    reads: list = dataclasses.field(default_factory=list, compare=False)

    def documents(self, split):
        self.reads.append(split)
        if split == "train":
            for i in range(self.count):
                yield self.letter * (i * 7 % 38) + f"{i:02}"
        else:
            yield from ("x" * 11, "y" * 30)

    def fingerprint(self):
        return f"{self.count} {self.letter}"


@dataclasses.dataclass(frozen=True)
class Talks:
    def documents(self, split):
        for i in range(9):
            yield tuple(Message("assistant" if j % 2 else "user", "ä" * (i + j)) for j in range(2 + i % 3))

    def fingerprint(self):
        return "talks"


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def segments_of(batch: Batch):
    """(tokens, targets, weights, positions) of each segment of each row."""
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max(initial=0) + 1):
            mine = batch.segments[row] == segment
            yield tuple(np.asarray(x)[row][mine] for x in (batch.tokens, batch.targets, batch.weights, batch.positions))


def stored(text):
    return [BOS, *BYTES.encode(text), END]


def join(batches):
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)
