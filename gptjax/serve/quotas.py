"""Quotas: the cost of a request is charged to its key and to the server before it waits, and settled at its end.

charge = quotas.admit(key, rows=n, tokens=len(prompt) + n * max_tokens)      # ApiError 429 if it is too much
try:
    ...
finally:
    charge.settle(used)                                                      # tokens that were read and written
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

from gptjax.serve.errors import ApiError
from gptjax.serve.keys import DAY, Key


class Bucket:
    """A token bucket: it holds at most `capacity`, is full at first, and fills evenly within `seconds`."""

    def __init__(self, capacity: float, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.capacity, self._rate, self._clock = capacity, capacity / seconds, clock
        self._level, self._at = capacity, clock()

    @property
    def level(self) -> float:
        """Its content now; less than nothing if more was used than was taken."""
        now = self._clock()
        self._level, self._at = min(self.capacity, self._level + (now - self._at) * self._rate), now
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until it holds so much. 0: it does. Infinity: it never will."""
        if amount > self.capacity:
            return math.inf
        return max(0.0, amount - self.level) / self._rate

    def take(self, amount: float) -> None:
        """Take this out. A negative amount is given back."""
        self._level = min(self.capacity, self.level - amount)


@dataclasses.dataclass
class _Account:
    """Use of a key."""

    limits: tuple[int | None, int | None]
    requests: Bucket | None
    tokens: Bucket | None
    rows: int = 0
    """Texts that are waited for or written."""


class Quotas:
    """Accounts of the keys, and of the server. For one thread, that of the event loop.

    rows   maximum number of texts that are waited for or written; with several keys, half of it for each
    tokens maximum number of tokens of their prompts and replies. None: no limit
    """

    def __init__(
        self, rows: int, tokens: int | None = None, shared: bool = False, clock: Callable[[], float] = time.monotonic
    ):
        self._limit, self._token_limit, self._clock = rows, tokens, clock
        self._key_limit = max(1, rows // 2) if shared else rows
        self._rows = self._tokens = 0
        self._accounts: dict[str, _Account] = {}

    def request(self, key: Key) -> None:
        """Count a request of this key. Raises `ApiError` 429 if there were too many within a minute."""
        bucket = self._account(key).requests
        if bucket is None:
            return
        if wait := bucket.wait(1):
            raise _busy(f"requests_per_minute: this key may send {bucket.capacity}", "rate_limit_exceeded", wait)
        bucket.take(1)

    def admit(self, key: Key, rows: int, tokens: int) -> Charge:
        """Charge a request of so many texts and, at most, tokens. Raises `ApiError`: 429, or 400 for what can never be
        admitted."""
        account = self._account(key)
        if account.tokens is not None:
            wait, most = account.tokens.wait(tokens), f"{account.tokens.capacity:,}"
            if wait == math.inf:
                reason = f"must be at most {most}, the tokens_per_day of this key"
                raise ApiError(400, f"max_tokens: got {tokens:,} with the prompts, {reason}", "max_tokens")
            if wait:
                raise _busy(f"tokens_per_day: this key may use {most}", "rate_limit_exceeded", wait)
        for used, more, limit, unit in (
            (self._rows, rows, self._limit, "texts of all clients"),
            (account.rows, rows, self._key_limit, "texts of this key"),
            (self._tokens, tokens, self._token_limit, "tokens of all clients"),
        ):
            if limit is not None and used + more > limit:
                message = f"the server is busy: {used:,} {unit} are waited for, {more:,} more would exceed {limit:,}"
                raise _busy(message, "server_busy", 1.0)
        if account.tokens is not None:
            account.tokens.take(tokens)
        account.rows += rows
        self._rows += rows
        self._tokens += tokens
        return Charge(self, account, rows, tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """Headers with what is left, under OpenAI's names."""
        account, found = self._account(key), {}
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{name}"] = f"{math.ceil(bucket.wait(bucket.capacity))}s"
        return found

    def end(self, account: _Account, rows: int, charged: int, used: int) -> None:
        """Give back what a request did not use; for `Charge`."""
        account.rows -= rows
        self._rows -= rows
        self._tokens -= charged
        if account.tokens is not None:
            account.tokens.take(used - charged)

    def _account(self, key: Key) -> _Account:
        limits = key.requests_per_minute, key.tokens_per_day
        account = self._accounts.get(key.digest)
        if account is None or account.limits != limits:
            requests, tokens = limits
            account = self._accounts[key.digest] = _Account(
                limits,
                None if requests is None else Bucket(requests, 60, self._clock),
                None if tokens is None else Bucket(tokens, DAY, self._clock),
            )
        return account


@dataclasses.dataclass
class Charge:
    """Charge of a request."""

    quotas: Quotas
    account: _Account
    rows: int
    tokens: int
    settled: bool = False

    def settle(self, used: int) -> None:
        """The request has ended, and read and wrote so many tokens. Further calls change nothing."""
        if not self.settled:
            self.settled = True
            self.quotas.end(self.account, self.rows, self.tokens, used)


def _busy(message: str, code: str, wait: float) -> ApiError:
    seconds = math.ceil(wait)
    return ApiError(429, f"{message}; try again in {seconds} s", code=code, retry_after=seconds)
