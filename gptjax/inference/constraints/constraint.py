"""Interfaces of a constraint on a text: the tokens that may come next, as the text grows."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Matcher(Protocol):
    """The state of one text under a constraint. Its methods raise UserError if the constraint cannot go on."""

    def fill(self, mask: np.ndarray) -> None:
        """Write the tokens that may come next, without the end of the text: bit i % 32 of word i // 32 is token i.

        mask  uint32 [ceil(V / 32)]
        """
        ...

    def accept(self, token: int) -> None:
        """Append a token."""
        ...

    @property
    def accepting(self) -> bool:
        """True: the text may end here."""
        ...

    @property
    def finished(self) -> bool:
        """True: nothing may follow."""
        ...


class Constraint(Protocol):
    """A rule that texts keep. It is not changed by its texts, which may share it."""

    def start(self) -> Matcher:
        """The state of a new text."""
        ...
