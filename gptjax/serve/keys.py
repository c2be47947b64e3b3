"""API keys: a file of their digests, with scopes, expiry and quotas. The keys themselves are kept nowhere.

    secret = add(Path("keys.json"), "alice", expires=time.time() + 30 * DAY)     # shown once
    keys = Keys(Path("keys.json"))
    keys.find(secret).name                             # reads the file again when it changes

A key has 256 random bits, so one round of SHA-256 cannot be searched backwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptjax.io import atomic
from gptjax.io.json_file import NUMBER, POSITIVE, TEXT, check, read_object
from gptjax.types import UserError

SCOPES = ("chat", "completions", "embeddings", "metrics", "admin")
"""Groups of routes that a key may open. The lists of models and the tokenizers are open to every key."""
DAY = 86_400
PREFIX = "gptjax-"
"""Beginning of every key, by which scanners of published code can know one."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A key's rights. Quotas are per server process."""

    name: str
    digest: str = ""
    """SHA-256 of the key in hexadecimal. Empty: whoever asks without a key."""
    scopes: tuple[str, ...] = SCOPES
    created: float = 0.0
    """Seconds since 1970, as `expires`."""
    expires: float | None = None
    """None: never."""
    requests_per_minute: int | None = None
    """None: no limit, as for `tokens_per_day`."""
    tokens_per_day: int | None = None
    """Tokens of prompts and replies together."""

    @property
    def expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires


ANYONE = Key("anyone", scopes=tuple(scope for scope in SCOPES if scope != "admin"))
"""Whoever asks a server without keys."""
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("name", "digest"), TEXT),
    "scopes": [TEXT],
    **dict.fromkeys(("created", "expires"), NUMBER),
    "requests_per_minute": POSITIVE,
    "tokens_per_day": POSITIVE,
}


def digest_of(secret: str) -> str:
    """The digest under which a key is kept."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def read(file: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises UserError."""
    try:
        content = read_object(file)
        check(content, {"keys": [_FIELDS]}, file.name)
        keys = [Key(**{**entry, "scopes": tuple(entry["scopes"])}) for entry in content["keys"]]
    except (OSError, ValueError, LookupError, TypeError) as error:  # UserError is a ValueError
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError | TypeError) else error
        raise UserError(f"keys: got {file}, which is no file of gptjax keys: {reason}") from None
    for key in keys:
        if len(key.digest) != 64 or not key.name or not set(key.scopes) <= set(SCOPES):
            raise UserError(f"keys: got {file}, where {key.name[:40]!r} has no digest, or unknown scopes")
    return tuple(keys)


def write(file: Path, keys: Iterable[Key]) -> None:
    """Replace the file, which its owner alone may read."""
    content = {"keys": [dataclasses.asdict(key) for key in keys]}
    with atomic.new(file) as partial:
        partial.touch(0o600)
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add(file: Path, name: str, **rights: Any) -> str:
    """Add a key with these fields of `Key` to the file, which is created if there is none, and return the key. Raises
    UserError for a name that is taken."""
    secret = PREFIX + secrets.token_urlsafe(32)
    with atomic.lock(f"{file}.lock"):
        keys = read(file) if file.exists() else ()
        if any(key.name == name for key in keys):
            raise UserError(f"name: got {name}, which has a key already; revoke it first, or choose another name")
        write(file, [*keys, Key(name, digest_of(secret), created=round(time.time()), **rights)])
    return secret


def revoke(file: Path, name: str) -> None:
    """Take the key of this name out of the file. Raises UserError if there is none."""
    with atomic.lock(f"{file}.lock"):
        keys = read(file)
        if all(key.name != name for key in keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise UserError(f"name: got {name}, must be one of the names in {file}: {known}")
        write(file, [key for key in keys if key.name != name])


class Keys:
    """The keys of a file as it is now, and others.

    file    written by `add`; read again when it has changed. None: no file
    others  secrets that open everything
    """

    def __init__(self, file: Path | None = None, others: Sequence[str] = ()):
        self._file = file
        self._others = tuple(Key(f"key {i + 1}", digest_of(secret)) for i, secret in enumerate(others))
        self._read: tuple[Key, ...] = ()
        self._seen: tuple[int, ...] | None = None
        self._refresh()

    def __bool__(self) -> bool:
        """True: a request must bring a key, even if the file has none (left)."""
        return self._file is not None or bool(self._others)

    @property
    def shared(self) -> bool:
        """True: there may be several clients."""
        return self._file is not None

    def find(self, secret: str) -> Key | None:
        """The key that this is, expired or not. Takes the same time whatever part of it is right. Raises UserError,
        and admits nobody, while the file cannot be read."""
        self._refresh()
        digest, found = digest_of(secret), None
        for key in (*self._others, *self._read):
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            stat = os.stat(self._file)
        except OSError as error:
            raise UserError(f"keys: got {self._file}, which cannot be read ({error.strerror})") from None
        seen = stat.st_ino, stat.st_mtime_ns, stat.st_size
        if seen != self._seen:
            self._read = read(self._file)
            self._seen = seen
