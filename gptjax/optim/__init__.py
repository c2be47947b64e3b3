"""Learning-rate schedules, optimizers and parameter groups, over optax."""

from gptjax.optim.adafactor import Adafactor
from gptjax.optim.groups import Group, Groups, HasAxis, HasKind, MaxAxes, Predicate
from gptjax.optim.muon import Muon
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
    "Linear",
    "Lion",
    "MaxAxes",
    "Muon",
    "Optimizer",
    "Predicate",
    "Schedule",
    "WarmupStableDecay",
]
