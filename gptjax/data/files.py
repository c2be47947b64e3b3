"""Text files by path, glob or URL (downloaded once into the cache folder), read line by line, and digests of files."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.io import atomic, retry
from gptjax.types import Json, UserError, one_line

BLOCK, BLOCKS = 1 << 18, 256
"""Bytes and number of the blocks that are read of a larger file, 64 MiB in all. Smaller files are read whole."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def cache_dir() -> Path:
    """Folder of downloads and built data sets: `$GPTJAX_CACHE`, else `~/.cache/gptjax`."""
    return Path(os.environ.get("GPTJAX_CACHE") or "~/.cache/gptjax").expanduser()


def download(url: str) -> Path:
    """The cached file of an http(s) `url`, downloaded on first use.

    Raises UserError if the server refuses (4xx) or all attempts fail.
    """
    name = Path(urllib.parse.urlsplit(url).path).name or "index"
    target = cache_dir() / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        retry.call(lambda: _fetch(url, target), f"download of {url}")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"path: got {url}, which could not be downloaded ({one_line(error)}); "
            f"check the address and the network, or download the file yourself and give its path"
        ) from error
    return target


def _fetch(url: str, target: Path) -> None:
    """One attempt."""
    try:
        response = urllib.request.urlopen(url, timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    with response, atomic.new(target, shared=True) as partial, partial.open("wb") as file:
        shutil.copyfileobj(response, file)
        # http.client does not raise when the connection breaks in the middle of a body.
        if response.length:
            raise ConnectionError(f"the connection broke {response.length} bytes before the end")


def find_files(path: str) -> list[Path]:
    """Files of `path` (file, glob or URL), sorted. Raises UserError if there are none, or an empty one."""
    if path.startswith(("http://", "https://")):
        return [download(path)]
    plain = Path(path).expanduser()
    if plain.is_dir():
        raise UserError(f"path: got the folder {path}, must be a file, a glob such as {plain / '*.txt'} or a URL")
    found = [plain] if plain.exists() else sorted(Path(p) for p in glob.glob(str(plain), recursive=True))
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(f"path: got {path}, which does not exist (seen from {Path.cwd()})")
    for file in found:
        if not file.stat().st_size:
            raise UserError(f"path: got {file}, which is empty; must hold text")
    return found


def file_state(path: str) -> list[Any]:
    """Facts that change when the files of `path` change: paths, sizes and times of modification, also that which the
    system keeps, as copies and archives restore the other."""
    stats = [(file, file.stat()) for file in find_files(path)]
    if path.startswith(("http://", "https://")):  # time and place of a download do not matter
        return [stat.st_size for _, stat in stats]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]


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


def read_lines(path: Path, invalid: Literal["error", "skip"] = "error") -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file, gzipped if it ends in .gz. Line ends become "\\n".

    Raises UserError, naming file and line, for a line that is not UTF-8. With `invalid` "skip" such lines are left out,
    and their number is logged at the end.
    """
    skipped = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"path: {path}: got UTF-16, must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    if invalid == "error":
                        raise UserError(
                            f"path: {path}:{number}: got invalid UTF-8 (byte 0x{line[error.start]:02x} at column "
                            f'{error.start + 1}); mend the file, or leave such lines out with invalid "skip"'
                        ) from None
                    skipped += 1
                    continue
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"path: {path}: damaged gzip file ({error}); copy or download it again") from None
    if skipped:
        logging.getLogger(__name__).warning("%s: skipped %d lines that are not UTF-8", path, skipped)


class Where(NamedTuple):
    """Place of a row, shown as "file:row"."""

    file: str
    row: int
    """Counted from 1; in a file of lines, the line."""

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


def read_json(path: Path, invalid: Literal["error", "skip"] = "error") -> Iterator[tuple[Where, Any]]:
    """Place and value of each row of a JSON file: one value per line, empty lines left out, or one array of rows,
    `[{"instruction": ...}, ...]`, which is read into memory. (A line that is a list of messages is a row.)

    Raises UserError, naming file and row, for a row that is not JSON, or has half of a surrogate pair, which is no
    text. With `invalid` "skip" the latter are left out, and their number is logged at the end.
    """
    skipped = 0
    for number, text, value in _json_rows(path, invalid):
        if "\\u" in text and (half := _SURROGATE.search(json.dumps(value, ensure_ascii=False))):
            if invalid == "error":
                raise UserError(
                    f"path: {path}:{number}: has half of a surrogate pair (\\u{ord(half[0]):04x}), which is no "
                    'character; mend the line, or leave such lines out with invalid "skip"'
                )
            skipped += 1
            continue
        yield Where(str(path), number), value
    if skipped:
        logging.getLogger(__name__).warning("%s: skipped %d lines with half of a surrogate pair", path, skipped)


def _json_rows(path: Path, invalid: Literal["error", "skip"]) -> Iterator[tuple[int, str, Any]]:
    """(number, text that spells it, value) of each row."""
    lines = ((number, line) for number, line in read_lines(path, invalid) if line.strip())
    for count, (number, line) in enumerate(lines):
        try:
            value, fault = json.loads(line), None
        except ValueError as error:
            value, fault = None, error
        opens = count == 0 and line.lstrip().startswith("[")
        if opens and (fault is not None or (value and _is_row(value[0]))):
            text = line + "".join(rest for _, rest in lines)
            try:
                items = json.loads(text)
            except ValueError as error:
                raise UserError(f"path: {path}: not JSON ({error}); must be one array, or one value per line") from None
            yield from ((i, text, item) for i, item in enumerate(items, 1))
            return
        if fault is not None:
            raise UserError(f"path: {path}:{number}: not JSON ({fault}); must be one JSON value per line")
        yield number, line, value


def _is_row(item: object) -> bool:
    """True if an item of a list is a row, such as a conversation, and no message of one."""
    return isinstance(item, list) or (isinstance(item, dict) and "role" not in item)


def field(row: Json, *names: str, kind: type | tuple[type, ...] = str) -> Any:
    """A row's value in the first of these fields that it has. Raises UserError if it has none, or of another type."""
    if not isinstance(row, Mapping):
        raise UserError(f"got {type(row).__name__}, must be an object with {' or '.join(map(repr, names))}")
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
                wanted = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
                raise UserError(f"{name}: got {str(value)[:80]!r} ({type(value).__name__}), must be {wanted}")
            return value
    raise UserError(f"got the fields {', '.join(map(str, row))}, must have {' or '.join(map(repr, names))}")
