"""Masks of personal data, the same as those of the service."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

from gptjax.data.masks import Mask
from gptjax.data.prepare.steps import Edit, Step
from gptjax.types import UserError

_MASKED = re.compile(r"(?<=\[)(?:e-mail|telephone|card|bank account)(?=\])")


@dataclasses.dataclass(frozen=True)
class MaskPersonal(Step):
    """Replaces e-mail addresses, telephone numbers that exist, and numbers of cards and bank accounts by `[e-mail]`,
    `[telephone]`, `[card]` and `[bank account]`."""

    region: str = "US"
    """Country, as ISO 3166 names it, of telephone numbers without a country code."""

    def __call__(self, text: str) -> str | Edit:
        masked = _mask(self.region)(text)
        if masked == text:
            return text
        counts = collections.Counter(_MASKED.findall(masked)) - collections.Counter(_MASKED.findall(text))
        return Edit(masked, counts, private=True)


@functools.cache
def _mask(region: str) -> Mask:
    try:
        import phonenumbers  # noqa: F401
        import stdnum  # noqa: F401
    except ImportError:
        raise UserError(
            "steps: MaskPersonal needs phonenumbers and python-stdnum; pip install 'gptjax[data]'"
        ) from None
    return Mask(region)
