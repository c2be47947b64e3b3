"""Pseudorandom permutations of any size, without a table."""

from __future__ import annotations

import functools

import numpy as np


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
