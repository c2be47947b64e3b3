"""Who is next: by priority, then fairly by client, then in order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class _Asks(Protocol):
    @property
    def priority(self) -> int: ...

    @property
    def client(self) -> str: ...


Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A virtual token counter per client (Sheng et al. 2024, arXiv:2401.00588): among those who wait with the highest
    priority, the client that was served the fewest tokens is next. A client that returns starts at the least of those
    who wait, so that it cannot save up."""

    def __init__(self):
        self._waiting: dict[tuple[int, str], deque[Item]] = {}
        self._served: dict[str, float] = {}

    def push(self, item: Item, asks: _Asks, first: bool = False) -> None:
        """Add an item at the end of its client's queue, or at its beginning."""
        client, waiting = asks.client, self.clients
        if client not in waiting and waiting:
            least = min(self._served.get(other, 0.0) for other in waiting)
            self._served[client] = max(self._served.get(client, 0.0), least)
        queue = self._waiting.setdefault((asks.priority, client), deque())
        queue.appendleft(item) if first else queue.append(item)

    def peek(self) -> Item | None:
        """The next item, or None."""
        return self._waiting[key][0] if (key := self._next()) is not None else None

    def pop(self) -> Item:
        """Take the next item."""
        key = self._next()
        assert key is not None, "nobody waits"
        item = self._waiting[key].popleft()
        self._tidy(key)
        return item

    def remove(self, item: Item) -> bool:
        """Take this item out. False: it is not here."""
        for key, queue in self._waiting.items():
            if item in queue:
                queue.remove(item)
                self._tidy(key)
                return True
        return False

    def serve(self, client: str, tokens: float) -> None:
        """The client was served so many tokens."""
        self._served[client] = self._served.get(client, 0.0) + tokens

    @property
    def clients(self) -> set[str]:
        """Clients who wait."""
        return {client for _, client in self._waiting}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        return (item for queue in self._waiting.values() for item in queue)

    def _next(self) -> tuple[int, str] | None:
        return min(
            self._waiting, key=lambda key: (-key[0], self._served.get(key[1], 0.0)), default=None
        )  # of equals the first, which came first

    def _tidy(self, key: tuple[int, str]) -> None:
        if not self._waiting[key]:
            del self._waiting[key]
