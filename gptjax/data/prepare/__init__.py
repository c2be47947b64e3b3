"""Preparation of texts: steps that repair, judge, compare and mask documents, with a report.

from gptjax.data import Jsonl, prepare

cleaned = prepare.Pipeline(Jsonl("web/*.jsonl.gz"), prepare.RECIPES["fineweb"], processes=8)

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.data.prepare.chinese import ChineseQuality, ChineseRepetition
    from gptjax.data.prepare.decontaminate import Decontaminate
    from gptjax.data.prepare.duplicates import ExactDuplicates, NearDuplicates
    from gptjax.data.prepare.gopher import GopherQuality, GopherRepetition
    from gptjax.data.prepare.language import Language
    from gptjax.data.prepare.output import clean_files
    from gptjax.data.prepare.personal import MaskPersonal
    from gptjax.data.prepare.pipeline import Pipeline
    from gptjax.data.prepare.recipes import RECIPES
    from gptjax.data.prepare.repair import FixEncoding, Length, Normalise, WordList
    from gptjax.data.prepare.steps import CorpusStep, Document, Drop, Edit, Step
    from gptjax.data.prepare.web import C4Quality, FineWebQuality

__all__ = [
    "RECIPES",
    "C4Quality",
    "ChineseQuality",
    "ChineseRepetition",
    "CorpusStep",
    "Decontaminate",
    "Document",
    "Drop",
    "Edit",
    "ExactDuplicates",
    "FineWebQuality",
    "FixEncoding",
    "GopherQuality",
    "GopherRepetition",
    "Language",
    "Length",
    "MaskPersonal",
    "NearDuplicates",
    "Normalise",
    "Pipeline",
    "Step",
    "WordList",
    "clean_files",
]

_NAMES = {
    "gptjax.data.prepare.chinese": "ChineseQuality ChineseRepetition",
    "gptjax.data.prepare.decontaminate": "Decontaminate",
    "gptjax.data.prepare.duplicates": "ExactDuplicates NearDuplicates",
    "gptjax.data.prepare.gopher": "GopherQuality GopherRepetition",
    "gptjax.data.prepare.language": "Language",
    "gptjax.data.prepare.output": "clean_files",
    "gptjax.data.prepare.personal": "MaskPersonal",
    "gptjax.data.prepare.pipeline": "Pipeline",
    "gptjax.data.prepare.recipes": "RECIPES",
    "gptjax.data.prepare.repair": "FixEncoding Length Normalise WordList",
    "gptjax.data.prepare.steps": "CorpusStep Document Drop Edit Step",
    "gptjax.data.prepare.web": "C4Quality FineWebQuality",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.data.prepare' has no attribute {name!r}")
