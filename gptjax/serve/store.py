"""A store of conversations, encrypted: SQLite, whose contents only a key opens.

    store = Store(Path("store.sqlite"), [new_key()])
    store.put("resp_1", key, {"items": [...]})
    store.get("resp_1", key.digest)                    # None for another key's
    store.delete(user="alice"); store.delete(older_than=30 * DAY)

Names of users, times and sizes can be read without the key; they are what deletion and export go by.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.serve.keys import Key
from gptjax.types import UserError

TABLE = """
create table if not exists conversations (
    id text primary key, user text not null, digest text not null, time real not null, content blob not null
) strict;
create index if not exists by_user on conversations (user);
create index if not exists by_time on conversations (time);
"""


def new_key() -> str:
    """A key for a store, 256 random bits."""
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


class Store:
    """Conversations of all users. Safe to use from any thread. Raises UserError for a bad file or key.

    file  created if there is none, for its owner alone
    keys  of `new_key`; the first encrypts, all decrypt
    """

    def __init__(self, file: Path, keys: Sequence[str]):
        from cryptography.fernet import Fernet, InvalidToken, MultiFernet

        try:
            self._box = MultiFernet([Fernet(key) for key in keys])
        except (ValueError, TypeError):
            raise UserError("store_key: got no key of a store, must be one that gptjax store key has made") from None
        self._lock = threading.Lock()
        try:
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(file, check_same_thread=False)
            self._db.execute("pragma secure_delete = on")
            self._db.executescript(TABLE)
            row = self._db.execute("select content from conversations limit 1").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"store: got {file}, which cannot be used: {error}") from None
        try:
            if row is not None:
                self._box.decrypt(row[0])
        except InvalidToken:
            self.close()
            raise UserError(f"store_key: got a key that does not open {file}") from None

    def put(self, identity: str, key: Key, content: dict[str, Any]) -> None:
        """Keep a conversation of this key's user."""
        data = self._box.encrypt(json.dumps(content).encode())
        self._do("insert into conversations values (?, ?, ?, ?, ?)", identity, key.name, key.digest, time.time(), data)

    def get(self, identity: str, digest: str) -> dict[str, Any] | None:
        """The conversation, if it is of the key with this digest."""
        query = "select content from conversations where id = ? and digest = ?"
        with self._lock:
            row = self._db.execute(query, (identity, digest)).fetchone()
        return None if row is None else json.loads(self._box.decrypt(row[0]))

    def remove(self, identity: str, digest: str) -> bool:
        """Delete a conversation of the key with this digest. False: there is none."""
        return self._do("delete from conversations where id = ? and digest = ?", identity, digest) > 0

    def delete(self, user: str | None = None, older_than: float | None = None) -> int:
        """Delete the conversations of a user, or older than so many seconds, or both; returns their number."""
        before = None if older_than is None else time.time() - older_than
        count = self._do(
            "delete from conversations where (?1 is null or user = ?1) and (?2 is null or time < ?2)", user, before
        )
        with self._lock:
            self._db.execute("vacuum")
        return count

    def export(self, user: str) -> Iterator[dict[str, Any]]:
        """All that is kept of a user, in the order of time."""
        query = "select id, time, content from conversations where user = ? order by time"
        with self._lock:
            rows = self._db.execute(query, (user,)).fetchall()
        for identity, at, data in rows:
            yield {"id": identity, "time": at, **json.loads(self._box.decrypt(data))}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _do(self, statement: str, *values: object) -> int:
        """Number of rows that the statement changes."""
        with self._lock, self._db:
            return self._db.execute(statement, values).rowcount
