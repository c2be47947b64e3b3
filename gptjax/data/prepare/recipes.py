"""Recipes: steps in the order of published corpora, by name, or those of a Python file."""

from __future__ import annotations

from pathlib import Path

from gptjax.data.prepare.chinese import ChineseQuality, ChineseRepetition
from gptjax.data.prepare.duplicates import ExactDuplicates, NearDuplicates
from gptjax.data.prepare.gopher import GopherQuality, GopherRepetition
from gptjax.data.prepare.language import Language
from gptjax.data.prepare.parts import load_module
from gptjax.data.prepare.personal import MaskPersonal
from gptjax.data.prepare.repair import FixEncoding, Length, Normalise
from gptjax.data.prepare.steps import CorpusStep, Step
from gptjax.data.prepare.web import C4Quality, FineWebQuality
from gptjax.types import UserError, one_line

Steps = tuple[Step | CorpusStep, ...]

_REPAIR: Steps = (FixEncoding(), Normalise())
_UNIQUE: Steps = (ExactDuplicates(), NearDuplicates())
_GOPHER: Steps = (GopherRepetition(), GopherQuality())
RECIPES: dict[str, Steps] = {
    "fineweb": (
        *_REPAIR,
        Language(),
        *_GOPHER,
        C4Quality(terminal_punctuation=False),
        FineWebQuality(),
        *_UNIQUE,
        MaskPersonal(),
    ),
    "c4": (*_REPAIR, Language(), C4Quality(), *_UNIQUE, MaskPersonal()),
    "gopher": (*_REPAIR, Language(), *_GOPHER, *_UNIQUE, MaskPersonal()),
    "chinese": (
        *_REPAIR,
        Language(("zh",)),
        ChineseRepetition(),
        ChineseQuality(),
        *_UNIQUE,
        MaskPersonal("CN"),
    ),
    "unique": (*_REPAIR, *_UNIQUE),
    "chat": (*_REPAIR, Length(least=8), *_UNIQUE, MaskPersonal()),
}
"""Name -> steps. "unique" has no rules of quality; "chat" is for conversations."""


def load_recipe(name: str) -> tuple[Steps, Path | None]:
    """The steps of a recipe's name, or `STEPS` of a Python file, and that file. Raises UserError."""
    if name in RECIPES:
        return RECIPES[name], None
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"recipe: got {name}, must be one of {', '.join(RECIPES)}, or a Python file with STEPS")
    try:
        steps = getattr(load_module(path.resolve()), "STEPS", None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"recipe: {path} cannot be run: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(steps, tuple) or not all(isinstance(step, Step | CorpusStep) for step in steps):
        raise UserError(f"recipe: got {path}, which must define STEPS, a tuple of steps")
    return steps, path.resolve()
