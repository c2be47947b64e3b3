"""Learning-rate schedules, optimizers and parameter groups, over optax.

A name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.optim.adafactor import Adafactor
    from gptjax.optim.groups import Group, Groups, HasAxis, HasKind, MaxAxes, Predicate
    from gptjax.optim.keep_zeros import KeepZeros
    from gptjax.optim.muon import Muon
    from gptjax.optim.normuon import NorMuon
    from gptjax.optim.optimizers import AdamW, Lion, Optimizer
    from gptjax.optim.schedules import Constant, Cosine, Linear, Schedule, WarmupStableDecay

__all__ = [
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "Group",
    "Groups",
    "HasAxis",
    "HasKind",
    "KeepZeros",
    "Linear",
    "Lion",
    "MaxAxes",
    "Muon",
    "NorMuon",
    "Optimizer",
    "Predicate",
    "Schedule",
    "WarmupStableDecay",
]

_HOME = {
    "Adafactor": "gptjax.optim.adafactor",
    "Group": "gptjax.optim.groups",
    "Groups": "gptjax.optim.groups",
    "HasAxis": "gptjax.optim.groups",
    "HasKind": "gptjax.optim.groups",
    "MaxAxes": "gptjax.optim.groups",
    "Predicate": "gptjax.optim.groups",
    "KeepZeros": "gptjax.optim.keep_zeros",
    "Muon": "gptjax.optim.muon",
    "NorMuon": "gptjax.optim.normuon",
    "AdamW": "gptjax.optim.optimizers",
    "Lion": "gptjax.optim.optimizers",
    "Optimizer": "gptjax.optim.optimizers",
    "Constant": "gptjax.optim.schedules",
    "Cosine": "gptjax.optim.schedules",
    "Linear": "gptjax.optim.schedules",
    "Schedule": "gptjax.optim.schedules",
    "WarmupStableDecay": "gptjax.optim.schedules",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.optim' has no attribute {name!r}")
