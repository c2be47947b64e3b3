"""The pool's pages: which are free, who reads them, and which hold the beginning of a prompt that others may share.

    pages = Pages(100, size=64)
    chains = list(pages.chains(pages.root("weights 7", client), prompt))
    found = pages.find(chains)                 # pages that hold the first tokens of the prompt
    page = pages.take()                        # a page of one's own, or None
    pages.share(chains[len(found)], page)      # others may read it now
    page = pages.known(chains[-1])             # a page to copy, for a prompt that ends inside of it
    pages.release(page)

A page has one reader or more, or is kept for its tokens, or is free. Kept ones are taken, the longest unused first,
when no page is free.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

Chain = bytes
"""Digest of all the tokens up to the end of a page, and of all that their keys and values depend on."""


class Pages:
    """Pages 0 .. count - 1 of `size` tokens. The host's bookkeeping: nothing here touches the device."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.hits = 0
        """Number of tokens found in pages of others."""
        self._free = list(range(count - 1, -1, -1))
        self._readers = [0] * count
        self._pages: dict[Chain, int] = {}
        self._chains: dict[int, Chain] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # in the order of their last use

    @staticmethod
    def root(*fields: str) -> Chain:
        """Beginning of the chain of texts with these fields in common. Fields cannot run into each other."""
        digest = hashlib.sha256()
        for field in fields:
            data = field.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    def chains(self, root: Chain, tokens: Sequence[int]) -> Iterator[Chain]:
        """The chain of each page of these tokens, the last of which they may not fill."""
        ids, chain = np.asarray(tokens, np.int64), root
        for start in range(0, len(ids), self.size):
            chain = hashlib.sha256(chain + ids[start : start + self.size].tobytes()).digest()
            yield chain

    def find(self, chains: Sequence[Chain]) -> list[int]:
        """Pages that hold these chains, up to the first that is not there. The caller reads them from now on."""
        found = []
        for chain in chains:
            if (page := self._pages.get(chain)) is None:
                break
            self._kept.pop(page, None)
            self._readers[page] += 1
            found.append(page)
        self.hits += len(found) * self.size
        return found

    def known(self, chain: Chain) -> int | None:
        """The page that begins with this chain's last tokens, to be copied at once. None: there is none."""
        page = self._pages.get(chain)
        if page in self._kept:
            self._kept.move_to_end(page)
        return page

    def take(self) -> int | None:
        """A page for the caller alone. None: all have readers."""
        if not self._free:
            if not self._kept:
                return None
            page, _ = self._kept.popitem(last=False)
            del self._pages[self._chains.pop(page)]
            self._free.append(page)
        page = self._free.pop()
        self._readers[page] = 1
        return page

    def share(self, chain: Chain, page: int) -> None:
        """Let others read this page of the caller's, which holds the chain's last tokens, or copy it if the caller
        writes behind them. They will not change."""
        if chain not in self._pages:
            self._pages[chain], self._chains[page] = page, chain

    def release(self, page: int) -> None:
        """The caller reads it no more."""
        self._readers[page] -= 1
        assert self._readers[page] >= 0, f"page {page} was released twice"
        if not self._readers[page]:
            if page in self._chains:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Keep no page for its tokens: what they hold is of no use any more. Readers keep theirs."""
        self._pages.clear()
        self._chains.clear()
        self._free += self._kept
        self._kept.clear()

    @property
    def free(self) -> int:
        """Number of pages without readers."""
        return len(self._free) + len(self._kept)

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        read = [page for page, readers in enumerate(self._readers) if readers]
        assert sorted([*read, *self._free, *self._kept]) == list(range(self.count)), "free + kept + read = all"
        assert {chain: page for page, chain in self._chains.items()} == self._pages
