"""Names that become names of files: those of an experiment's stages, which a folder from elsewhere may bring."""

from __future__ import annotations

import re

from gptjax.types import UserError


def check_file_name(name: str, field: str) -> None:
    """Raise UserError, naming the field, for a name that is a path, hidden, or unfit for a file."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(
            f"{field}: got the name {name[:100]!r}, must be 1 to 100 letters, digits, _, - and ., not a . first"
        )
