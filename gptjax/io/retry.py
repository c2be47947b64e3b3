"""Retries with exponential backoff: disks on a network, buckets and servers fail for seconds, runs last for weeks."""

from __future__ import annotations

import http.client
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from gptjax.types import UserError, one_line

ATTEMPTS = 5
"""Consecutive failures after which we give up."""
PAUSE = 1.0
"""Seconds before the second attempt; each later pause is twice the one before."""
LONGEST_PAUSE = 60.0
"""Maximum pause, in seconds."""

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_log = logging.getLogger(__name__)
Item = TypeVar("Item")


def transient(error: BaseException) -> bool:
    """True if another attempt may succeed: OSError (timeouts, connections and fsspec's too) and broken HTTP replies,
    but no missing file or right, and no status of a server that blames the request: 4xx, save 408 and 429."""
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(code, int) and 400 <= code < 600:
        return code >= 500 or code in (408, 429)
    return isinstance(error, OSError | http.client.HTTPException) and not isinstance(error, _PERMANENT)


def pause(failures: int) -> float:
    """Seconds to wait after so many consecutive failures."""
    return min(PAUSE * 2.0 ** min(failures - 1, 100), LONGEST_PAUSE)


def call(function: Callable[[], Item], task: str) -> Item:
    """The result of `function()`, called again after transient errors. Raises the error of the last attempt."""
    failures = 0
    while True:
        try:
            return function()
        except Exception as error:
            failures += 1
            if not transient(error) or failures >= ATTEMPTS:
                raise
            _wait(failures, task, error)


def stream(start: Callable[[], Iterator[Item]], source: object) -> Iterator[Item]:
    """Documents of the iterator `start()`, which is started again after transient errors and resumed where it broke.

    It must give the same documents every time: those given already are skipped. Raises UserError, naming the source,
    the document and the reason, after `ATTEMPTS` attempts without a further document.
    """
    given = failures = 0
    while True:
        try:
            for item in itertools.islice(start(), given, None):
                given, failures = given + 1, 0
                yield item
            return
        except Exception as error:
            if not transient(error):
                raise
            failures += 1
            if failures >= ATTEMPTS:
                raise UserError(
                    f"source: got {source}, which could not be read at document {given} "
                    f"({failures} times: {one_line(error)}); when it can be read again, start again"
                ) from error
            _wait(failures, f"{source}, document {given}", error)


def _wait(failures: int, task: str, error: Exception) -> None:
    _log.warning("%s: failed (%s); trying again in %g s", task, one_line(error), pause(failures))
    time.sleep(pause(failures))
