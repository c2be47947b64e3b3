"""What an evaluation finds: numbers for programs, a few lines of Markdown for people."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Result:
    title: str
    """Heading in the report."""
    values: dict[str, float]
    """Name -> number; units in the name."""
    markdown: str
    """The finding, to read."""
