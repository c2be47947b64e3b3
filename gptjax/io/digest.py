"""Digests of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

BLOCK, BLOCKS = 1 << 18, 256
"""Bytes and number of the blocks that are read of a larger file, 64 MiB in all. Smaller files are read whole."""


def file_digest(path: Path, *facts: str, whole: bool = False) -> str:
    """SHA-256, in hex, of facts, a file's size and its content: all of it if it has at most 64 MiB or `whole` is set,
    else 256 blocks of 256 KiB at equal distances, the first and the last among them."""
    size = path.stat().st_size
    whole |= size <= BLOCK * BLOCKS
    count = -(-size // BLOCK) if whole else BLOCKS
    hashed = hashlib.sha256(json.dumps([size, *facts]).encode())
    with open(path, "rb") as file:
        for block in range(count):
            if not whole:
                file.seek(block * (size - BLOCK) // (count - 1))
            hashed.update(file.read(BLOCK))
    return hashed.hexdigest()
