"""Exact and near duplicates. Of documents that are alike, the first is kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.data.prepare.steps import Corpus, CorpusStep, Found
from gptjax.data.prepare.words import n_grams, normal_words
from gptjax.types import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(CorpusStep):
    """Drops documents with the words of an earlier one, without regard to case, punctuation and white space. Takes 40
    bytes of memory per document."""

    reason = "exact_duplicate"

    def signature(self, texts: list[str]) -> np.ndarray:
        """uint64 [n, 2]: 128 bits of BLAKE2b of the normal form."""
        normal = (" ".join(normal_words(text)) or text for text in texts)
        hashes = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in normal)
        return np.frombuffer(hashes, np.uint64).reshape(-1, 2)

    def find(self, corpus: Corpus, folder: Path) -> list[Found]:
        if not len(corpus):
            return []
        hashes = np.concatenate([*corpus.signatures()])
        order = np.lexsort((np.arange(len(hashes)), hashes[:, 0], hashes[:, 1]))
        new = np.append(True, (hashes[order[1:]] != hashes[order[:-1]]).any(1))
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        return sorted(Found(int(one), int(kept)) for one, kept in zip(order[~new], first[~new], strict=True))


@dataclasses.dataclass(frozen=True)
class NearDuplicates(CorpusStep):
    """Drops documents that are nearly the same as an earlier one that is kept: candidates by MinHash, verified by their
    Jaccard similarity.

    A document's n-grams of words (of characters in Chinese) are hashed by MinHash (Broder 1997); documents with one of
    `bands` bands of `rows` values in common are candidates: at similarity s, a share of 1 - (1 - s^rows)^bands of the
    pairs. Only a kept document drops others, so a chain of small changes does not drop all of its links. Takes 32 bytes
    of memory per document, and more for candidates."""

    n: int = 5
    """Words of an n-gram."""
    bands: int = 14
    rows: int = 8
    threshold: float = 0.8
    """Smallest Jaccard similarity of the sets of n-grams."""
    seed: int = 1

    reason = "near_duplicate"

    def __post_init__(self) -> None:
        for name in ("n", "bands", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, must be at least 1")
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold: got {self.threshold}, must be above 0 and at most 1")

    def signature(self, texts: list[str]) -> np.ndarray:
        """uint64 [n, bands]."""
        minhash = _rensa()
        grams = [n_grams(normal_words(text), self.n) or [text] for text in texts]
        digests = np.array(minhash.digests_from_token_sets(grams, self.bands * self.rows, self.seed), np.uint64)
        digests = digests.reshape(len(texts), self.bands, self.rows)
        hashes = np.zeros(digests.shape[:2], np.uint64)
        for row in range(self.rows):
            hashes = (hashes ^ digests[..., row]) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(29)
        return hashes

    def find(self, corpus: Corpus, folder: Path) -> list[Found]:
        hashed = functools.lru_cache(maxsize=256)(lambda document: self._hashes(corpus.text(document)))
        leaders: dict[int, list[int]] = {}
        found: list[Found] = []
        crowded = False
        for document, buckets in self._buckets(corpus):
            alike = sorted({kept for bucket in buckets for kept in leaders.get(bucket, ())})
            mine = hashed(document) if alike else None
            kept = next((kept for kept in alike if _jaccard(hashed(kept), mine) >= self.threshold), None)
            if kept is not None:
                found.append(Found(document, kept))
                continue
            for bucket in buckets:
                if len(leaders.setdefault(bucket, [])) < CROWD:
                    leaders[bucket].append(document)
                else:
                    crowded = True
        if crowded:
            log.warning("NearDuplicates: more than %d different documents share a band; give more rows", CROWD)
        return found

    def _hashes(self, text: str) -> np.ndarray:
        """Sorted hashes of a text's n-grams, each once."""
        grams = n_grams(normal_words(text), self.n) or [text]
        return np.unique(np.array(_rensa().hash_token_sets([grams])[0], np.uint64))

    def _buckets(self, corpus: Corpus) -> Iterator[tuple[int, list[int]]]:
        """Documents that share a band with another, in order, with the buckets that they share."""
        members, buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        count = 0
        for band in range(self.bands if len(corpus) else 0):
            hashes = np.concatenate([part[:, band] for part in corpus.signatures()])
            order = np.argsort(hashes, kind="stable")
            new = np.append(True, hashes[order[1:]] != hashes[order[:-1]])
            bucket = np.cumsum(new) - 1
            several = np.bincount(bucket)[bucket] > 1
            members.append(order[several])
            buckets.append(bucket[several] + count)
            count += int(bucket[-1]) + 1
        member, shared = np.concatenate(members), np.concatenate(buckets)
        order = np.argsort(member, kind="stable")
        member, shared = member[order], shared[order]
        ends = np.flatnonzero(np.diff(member)) + 1
        for of_document, of_buckets in zip(np.split(member, ends), np.split(shared, ends), strict=True):
            if len(of_document):
                yield int(of_document[0]), of_buckets.tolist()


CROWD = 100
"""Different documents of a bucket that others are compared with."""


def _jaccard(a: np.ndarray, b: np.ndarray | None) -> float:
    """Size of the intersection over that of the union of two sets, sorted."""
    assert b is not None
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _rensa():
    try:
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise UserError("steps: NearDuplicates needs the rensa library; pip install 'gptjax[data]'") from None
    return RMinHash
