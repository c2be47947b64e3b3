"""JSON files of other programs: read as an object, and checked against a schema of types, where they come in.

fields = read_object(folder / "config.json")
check(fields, {"hidden_size": POSITIVE, "architectures": [TEXT]}, "config.json")
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.types import UserError


class Kind(NamedTuple):
    """A kind of value."""

    name: str
    accepts: Callable[[Any], bool]


def _integer(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


INTEGER = Kind("an integer of at most 32 bits", lambda x: _integer(x, -(2**31)))
TEXT = Kind("text", lambda x: isinstance(x, str))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
NATURAL = Kind("an integer from 0 to 2^31 - 1", lambda x: _integer(x, 0))
POSITIVE = Kind("an integer from 1 to 2^31 - 1", lambda x: _integer(x, 1))
NUMBER = Kind("a finite number", lambda x: type(x) in (int, float) and -1e300 < x < 1e300 and math.isfinite(x))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
Schema = Any
"""A `Kind`; `[kind]`, a list; `{"*": kind}`, an object of any keys; `{"name": kind}`, an object with these fields among
others; `(kind, kind)`, one of several. Null is always allowed, and means a missing field."""


def read_object(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object in UTF-8. Raises OSError or ValueError, with the reason on one line."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file.name} is not a regular file")
    try:
        content = json.loads(file.read_bytes().decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def check_regular(folder: Path) -> None:
    """Raise UserError if the folder holds a pipe, a device or a socket: reading it may never end."""
    for file in folder.iterdir():
        if file.is_fifo() or file.is_socket() or file.is_char_device() or file.is_block_device():
            raise UserError(f"path: got {folder}, where {file.name} is not a regular file; delete it")


def check(value: object, schema: Schema, where: str) -> None:
    """Raise UserError, with the path of the field, for a value of another type than the schema's. where: the file."""
    if wrong := _wrong(value, schema, where):
        raise UserError(wrong)


def _wrong(value: object, schema: Schema, where: str) -> str | None:
    """Error message for a value that does not fit the schema, or None."""
    if value is None:
        return None
    if isinstance(schema, Kind):
        return None if schema.accepts(value) else f"{where}: got {_short(value)}, must be {schema.name}"
    if isinstance(schema, tuple):
        reasons = [_wrong(value, one, where) for one in schema]
        return None if None in reasons else f"{where}: got {_short(value)}, must be {' or '.join(map(_name, schema))}"
    if isinstance(schema, list) != isinstance(value, list) or not isinstance(value, list | dict):
        return f"{where}: got {_short(value)}, must be {_name(schema)}"
    if isinstance(value, list):
        inside = ((item, schema[0], f"{where}: {i}") for i, item in enumerate(value))
        inside = ((item, kind, place, item is None) for item, kind, place in inside)
    else:
        kinds = dict.fromkeys(value, schema["*"]) if "*" in schema else schema
        inside = ((value[name], kind, f"{where}: {name}", False) for name, kind in kinds.items() if name in value)
    for item, kind, place, null in inside:
        if null:
            return f"{place}: got null, must be {_name(kind)}"
        if wrong := _wrong(item, kind, place):
            return wrong
    return None


def _name(schema: Schema) -> str:
    if isinstance(schema, Kind):
        return schema.name
    return "a list" if isinstance(schema, list) else "an object"


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**100 else "a very large integer"
    return text if len(text) <= 100 else text[:99] + "…"
