"""`gptjax keys`: API keys of a server."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
Scope = Literal["chat", "completions", "embeddings", "metrics", "admin"]
SECONDS = {"m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
FILE = Path("keys.json")


def add(
    name: Name,
    file: Path = FILE,
    scopes: tuple[Scope, ...] = ("chat", "completions", "embeddings"),
    expires: str | None = None,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
) -> None:
    """Make a key and print it, this once. Servers with --keys FILE know it at once.

    Args:
        name: Whose key it is, for lists and logs.
        file: File of keys, created if there is none. It holds their digests only.
        scopes: What the key opens. chat: conversations and responses; metrics: /metrics; admin: /admin.
        expires: Time until the key expires, such as 12h, 30d or 8w. None: never.
        requests_per_minute: Maximum number of requests. None: no limit.
        tokens_per_day: Maximum number of tokens of prompts and replies. None: no limit.
    """
    from gptjax.serve import keys
    from gptjax.types import UserError

    if not name.isprintable() or not 1 <= len(name) <= 100:
        raise UserError(f"name: got {name[:100]!r}, must be 1 to 100 printable characters")
    for option, value in (("requests_per_minute", requests_per_minute), ("tokens_per_day", tokens_per_day)):
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"{option}: got {value}, must be 1 to {2**31 - 1}")
    if not scopes:
        raise UserError(f"scopes: got none, must be some of {', '.join(keys.SCOPES)}")
    secret = keys.add(
        file,
        name,
        scopes=tuple(dict.fromkeys(scopes)),
        expires=None if expires is None else round(time.time() + seconds(expires)),
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
    )
    print(secret)


def list_keys(file: Path = FILE) -> None:
    """List the keys: names, scopes, when they expire, quotas.

    Args:
        file: File of keys.
    """
    from gptjax.serve import keys

    for key in keys.read(file):
        if key.expires is None:
            end = "never expires"
        else:
            at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(key.expires))
            end = f"{'expired' if key.expired else 'expires'} {at}"
        quotas = [("requests a minute", key.requests_per_minute), ("tokens a day", key.tokens_per_day)]
        limits = [f"{value:,} {unit}" for unit, value in quotas if value is not None]
        print("; ".join([key.name, ", ".join(key.scopes), end, *limits]))


def revoke(name: Name, file: Path = FILE) -> None:
    """Take a key away. Servers with --keys FILE refuse it at once.

    Args:
        name: Whose key.
        file: File of keys.
    """
    from gptjax.serve import keys

    keys.revoke(file, name)


def seconds(text: str, option: str = "expires") -> int:
    """Seconds of a duration such as 30d. Raises UserError."""
    from gptjax.types import UserError

    match = re.fullmatch(r"([1-9]\d{0,5})([mhdw])", text)
    if match is None:
        raise UserError(f"{option}: got {text[:40]!r}, must be a number and m, h, d or w, such as 30d")
    return int(match[1]) * SECONDS[match[2]]
