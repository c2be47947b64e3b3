"""Mixtures of sources, and the order of their sequences."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.store import Tokens
from gptjax.protocols import Source, Split
from gptjax.types import UserError

Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Positions in the global order, int64 [R] -> (index of the source, index of its sequence), int64 [R] each. Sequence
`r` of epoch `e` of a source with n sequences has index `e * n + r`."""


@dataclasses.dataclass(frozen=True)
class Reweight:
    """Other weights of a mixture from a step of the stage on: a part of a curriculum."""

    step: int
    """First step with these weights, counted from 0."""
    weights: tuple[float, ...]
    """As `Mix.weights`. A weight of 0 leaves a source out; it is resumed where it was when it comes back."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """Weighted mixture of sources. Sequences alternate in a fixed pattern that is as close to the weights as whole
    sequences can be, at any point. An exhausted source starts again, in another order."""

    sources: tuple[Source | Tokens, ...]
    """Sources to mix."""
    weights: tuple[float, ...]
    """Share of the sequences from each source, in proportion: (3, 1) is three to one. It may be 0 if `schedule` has
    another."""
    schedule: tuple[Reweight, ...] = ()
    """Other weights from later steps on, in the order of the steps."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources: got none, must be at least one")
        for name, weights in (("weights", self.weights), *(("schedule", later.weights) for later in self.schedule)):
            if len(weights) != len(self.sources) or min(weights) < 0 or not sum(weights):
                raise UserError(f"{name}: got {weights}, must be a positive number for each of {len(self.sources)}")
        for i in range(len(self.sources)):
            if not any(phase.weights[i] for phase in (self, *self.schedule)):
                raise UserError(f"weights: got 0 for source {i} in {self.weights}, must be positive, or so in schedule")
        steps = [0, *(later.step for later in self.schedule)]
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise UserError(f"schedule: got the steps {steps[1:]}, must be above 0, each above the one before")

    def phases(self, batch: int) -> list[Phase]:
        """The weights by position, for `batch` sequences per step."""
        return [Phase(0, self.weights), *(Phase(later.step * batch, later.weights) for later in self.schedule)]

    def documents(self, split: Split) -> Iterator:
        """All documents of each source in turn, regardless of the weights, for a tokenizer to be trained on."""
        return itertools.chain.from_iterable(source.documents(split) for source in self.sources)


class Phase(NamedTuple):
    """Weights of a mixture from a position on, counted in sequences."""

    start: int
    weights: tuple[float, ...]


def order(sizes: Sequence[int], phases: Sequence[Phase], seed: int | None) -> Order:
    """Order of sources with `sizes` sequences each. seed=None: not shuffled."""

    def rows(which: int, position: np.ndarray) -> np.ndarray:
        epoch, row = np.divmod(position, sizes[which])
        if seed is not None:
            for e in np.unique(epoch):
                row[epoch == e] = permute(row[epoch == e], sizes[which], (seed, which, int(e)))
        return epoch * sizes[which] + row

    if len(sizes) == 1:
        return lambda position: (np.zeros_like(position), rows(0, position))

    starts = np.array([phase.start for phase in phases])
    patterns = [_pattern(phase.weights) for phase in phases]
    used = [np.zeros(len(sizes), np.int64)]
    for pattern, phase, end in zip(patterns, phases, starts[1:], strict=False):
        used.append(used[-1] + _counts(pattern, phase.weights, int(end) - phase.start))

    def of_mixture(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which, row = np.zeros_like(position), np.zeros_like(position)
        phase = np.searchsorted(starts, position, "right") - 1
        for number in np.unique(phase):
            at = phase == number
            found = np.array([patterns[number](int(p)) for p in position[at] - starts[number]]).reshape(-1, 2)
            which[at], row[at] = found[:, 0], found[:, 1] + used[number][found[:, 0]]
        for number in range(len(sizes)):
            row[which == number] = rows(number, row[which == number])
        return which, row

    return of_mixture


def poisson(sequences: int, rate: float, batch: int, seed: int) -> Order:
    """Poisson sampling of one source: each of its sequences is in a step with probability `rate`, independently of all
    others and of other steps, as differential privacy counts on (arXiv:1607.00133).

    Position p is slot p % batch of step p // batch, and a pure function of seed and step. An empty slot has the source
    -1. Of more sequences than slots, random ones are left out.
    """

    def slots(step: int) -> np.ndarray:
        random = np.random.default_rng([seed, step])
        drawn = random.choice(sequences, random.binomial(sequences, rate), replace=False)[:batch]
        return np.pad(drawn, (0, batch - len(drawn)), constant_values=-1)

    def of_steps(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, at = np.unique(position // batch, return_inverse=True)
        sequence = np.stack([slots(int(step)) for step in steps])[at, position % batch]
        return np.where(sequence < 0, -1, 0), sequence

    return of_steps


Pattern = Callable[[int], tuple[int, int]]
"""Position -> (index of the source, number of its sequences before)."""


def _pattern(weights: Sequence[float]) -> Pattern:
    """The pattern of sources with these weights; those of weight 0 are not in it."""
    import grain

    present = [which for which, weight in enumerate(weights) if weight]
    endless = grain.MapDataset.range(1).repeat()
    mixed = grain.MapDataset.mix(
        [endless.map_with_index(lambda position, _, which=which: (which, position)) for which in present],
        [weights[which] for which in present],
    )

    def at(position: int) -> tuple[int, int]:
        found = mixed[position]
        assert found is not None  # no filter drops any
        return found

    return at


def _counts(pattern: Pattern, weights: Sequence[float], size: int) -> np.ndarray:
    """Sequences of each source among the first `size` of a pattern, int64 [sources]."""
    counts = np.zeros(len(weights), np.int64)
    missing = {which for which, weight in enumerate(weights) if weight}
    for position in itertools.count(size):
        if not missing:
            return counts
        which, before = pattern(position)
        if which in missing:
            counts[which] = before
            missing.remove(which)
    raise AssertionError


def epochs(sizes: Sequence[int], phases: Sequence[Phase], sequences: int) -> list[float]:
    """Epochs of each source in the first so many sequences."""
    read = np.zeros(len(sizes))
    for phase, end in zip(phases, [*(later.start for later in phases[1:]), sequences], strict=True):
        read += max(0, min(end, sequences) - phase.start) * np.array(phase.weights) / sum(phase.weights)
    return (read / np.array(sizes)).tolist()


def longest_epoch(sizes: Sequence[int], phases: Sequence[Phase]) -> float:
    """Number of sequences until every source has been read once; infinite if one never is."""
    last = phases[-1]
    before = epochs(sizes, phases, last.start)
    if any(weight == 0 and done < 1 for weight, done in zip(last.weights, before, strict=True)):
        return math.inf
    return bisect.bisect_left(range(1 << 60), 1.0, key=lambda n: min(epochs(sizes, phases, n)))


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Image of each index, int64 [R], under a pseudorandom permutation of range(size) with key `key`.

    A Feistel network on pairs of digits, iterated until the result is below `size` (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"). Grain's `index_shuffle` does the same for one index per call, on a domain of at
    least 2**16, which takes 0.4 ms per index for 100 sequences.
    """
    base = int(np.ceil(np.sqrt(size)))
    index = index.copy()
    walking = np.ones(len(index), bool)
    while walking.any():
        left, right = np.divmod(index[walking], base)
        for round_key in _round_keys(key):
            left, right = right, (left + _hash(right, round_key) % base) % base
        index[walking] = left * base + right
        walking = index >= size
    return index


@functools.lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(6, np.uint64)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64 finaliser of x + key, as non-negative int64."""
    x = x.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(33)).astype(np.int64)
