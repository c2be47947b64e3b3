"""Mixtures of sources, and the order of their sequences."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gptjax.data.store import Tokens
from gptjax.protocols import Source, Split
from gptjax.types import UserError

Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Positions in the global order, int64 [R] -> (index of the source, index of its sequence), int64 [R] each. Sequence
`r` of epoch `e` of a source with n sequences has index `e * n + r`."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """Weighted mixture of sources. Sequences alternate in a fixed pattern that is as close to the weights as whole
    sequences can be, at any point. An exhausted source starts again, in another order."""

    sources: tuple[Source | Tokens, ...]
    """Sources to mix."""
    weights: tuple[float, ...]
    """Share of the sequences from each source, in proportion: (3, 1) is three to one."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources: got none, must be at least one")
        if len(self.weights) != len(self.sources) or min(self.weights) <= 0:
            raise UserError(f"weights: got {self.weights}, must be a positive number for each of {len(self.sources)}")

    def documents(self, split: Split) -> Iterator:
        """All documents of each source in turn, regardless of the weights, for a tokenizer to be trained on."""
        return itertools.chain.from_iterable(source.documents(split) for source in self.sources)


def order(sizes: Sequence[int], weights: Sequence[float], seed: int | None) -> Order:
    """Order of sources with `sizes` sequences each. seed=None: not shuffled."""

    def rows(which: int, position: np.ndarray) -> np.ndarray:
        epoch, row = np.divmod(position, sizes[which])
        if seed is not None:
            for e in np.unique(epoch):
                row[epoch == e] = permute(row[epoch == e], sizes[which], (seed, which, int(e)))
        return epoch * sizes[which] + row

    if len(sizes) == 1:
        return lambda position: (np.zeros_like(position), rows(0, position))

    import grain

    endless = grain.MapDataset.range(1).repeat()
    mixed = grain.MapDataset.mix(
        [endless.map_with_index(lambda position, _, which=which: (which, position)) for which in range(len(sizes))],
        weights,
    )

    def of_mixture(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which, row = np.array([mixed[int(p)] for p in position]).reshape(-1, 2).T
        for number in range(len(sizes)):
            row[which == number] = rows(number, row[which == number])
        return which, row

    return of_mixture


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
