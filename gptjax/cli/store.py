"""`gptjax store`: the conversations that a server keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptjax.cli.keys import seconds

if TYPE_CHECKING:
    from gptjax.serve.store import Store

KEY = "GPTJAX_STORE_KEY"
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


def key() -> None:
    """Print a new key for a store. Whoever loses it has lost what the store holds."""
    from gptjax.serve.store import new_key

    print(new_key())


def export(file: File, user: str, store_key: Path | None = None) -> None:
    """Print all that is kept of a user, a JSON object per line.

    Args:
        file: File of the store.
        user: Name of the user's API key.
        store_key: File of the store's key. None: GPTJAX_STORE_KEY.
    """
    store = open_store(_existing(file), store_key)
    for conversation in store.export(user):
        print(json.dumps(conversation, ensure_ascii=False))
    store.close()


def delete(file: File, user: str | None = None, older_than: str | None = None, store_key: Path | None = None) -> None:
    """Delete conversations of a user, or those beyond an age, or both, and say how many.

    Args:
        file: File of the store.
        user: Name of the user's API key. None: all users.
        older_than: Age, such as 30d. None: any.
        store_key: File of the store's key. None: GPTJAX_STORE_KEY.
    """
    from gptjax.types import UserError

    if user is None and older_than is None:
        raise UserError("user: got none, must be given, or older_than")
    store = open_store(_existing(file), store_key)
    print(store.delete(user, None if older_than is None else seconds(older_than, "older_than")))
    store.close()


def open_store(file: Path, key_file: Path | None) -> Store:
    """The store, with the keys of a file, one per line, or of the environment. Raises UserError."""
    from gptjax.serve.store import Store
    from gptjax.types import UserError

    try:
        text = os.environ.get(KEY, "") if key_file is None else key_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"store_key: got {key_file}, which cannot be read: {error}") from None
    keys = text.split()
    if not keys:
        raise UserError(f"store_key: got no key, must be a file with one, or {KEY}; gptjax store key makes one")
    return Store(file, keys)


def _existing(file: Path) -> Path:
    from gptjax.types import UserError

    if not file.is_file():
        raise UserError(f"file: got {file}, must be the file of a store")
    return file
