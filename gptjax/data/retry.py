"""Reading again what failed on the way: network disks, buckets and servers fail for seconds, runs last for weeks."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gptjax.types import UserError

ATTEMPTS = 5
"""How often the same place is tried before it is given up."""
PAUSE = 1.0
"""Seconds before the second attempt; each later pause is twice the one before."""

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_log = logging.getLogger(__name__)
Item = TypeVar("Item")


def transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: OSError (timeouts, connections and fsspec's too), but no missing file or
    right, and no answer of a server that says the fault is ours: 4xx, save 408 and 429."""
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(code, int) and 400 <= code < 600:
        return code >= 500 or code in (408, 429)
    return isinstance(error, OSError) and not isinstance(error, _LASTING)


def stream(start: Callable[[], Iterator[Item]], source: Any) -> Iterator[Item]:
    """What the iterator that `start` gives has, begun anew where it fails, and gone on with where it broke.

    It must give the same items every time: what was given already is read over. Raises UserError, naming the source,
    the place and the reason, when `ATTEMPTS` attempts gave no further item.
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
            _again(failures, source, f"document {given}", error)


def _again(failures: int, source: Any, place: str, error: Exception) -> None:
    """Waits before the next attempt, or gives up."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if failures >= ATTEMPTS:
        raise UserError(
            f"source: got {source}, which could not be read at {place} ({failures} times: {reason}); "
            f"when it can be read again, start again"
        ) from error
    pause = PAUSE * 2 ** (failures - 1)
    _log.warning("%s: failed at %s (%s); trying again in %g s", source, place, reason, pause)
    time.sleep(pause)
