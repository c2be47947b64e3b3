"""Language identification."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from gptjax.data.prepare.steps import Drop, Step
from gptjax.types import UserError

READ = 4_000
"""Characters of a document that are looked at."""


@dataclasses.dataclass(frozen=True)
class Language(Step):
    """Keeps documents in one of these languages, identified by py3langid (97 languages)."""

    languages: tuple[str, ...] = ("en",)
    """ISO 639-1 codes, such as "en", "zh"."""
    probability: float = 0.65
    """Smallest probability of the language."""

    def __post_init__(self) -> None:
        if not self.languages:
            raise UserError('languages: got none, must be at least one code, such as "en"')
        if not 0 <= self.probability <= 1:
            raise UserError(f"probability: got {self.probability}, must be from 0 to 1")

    def __call__(self, text: str) -> str | Drop:
        identifier = _identifier()
        if unknown := set(self.languages) - set(identifier.nb_classes):
            raise UserError(f"languages: got {sorted(unknown)[0]}, must be of {', '.join(identifier.nb_classes)}")
        language, probability = identifier.classify(text[:READ])
        if language not in self.languages:
            return Drop(f"language {language}")
        return text if probability >= self.probability else Drop("language uncertain")


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("steps: Language needs the py3langid library; pip install 'gptjax[data]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
